"""GPT-BigCode (SantaCoder, StarCoder): GPT-2 with one key and value head for all queries, or with one for each.

With one for all, the merged projection stacks all queries, the key and the value; with one for each, it goes head by
head. The two are one order: that of groups of query heads, each with its key and value.
"""

from dataclasses import replace

from ...spec.config import LayerConfig
from ..family import Family, ParsedConfig, layer_norm
from ..fields import Fields
from ..gpt_like import layer_count, model, multi_head, plain_mlp
from ..permutation import separated_qkv
from ..table import QKV, linear, norm
from . import gpt2

TABLE = replace(
    gpt2.TABLE,
    layer=(
        *norm("ln_1", "attention_norm"),
        *linear("attn.c_attn", *QKV, reorder=separated_qkv),
        *linear("attn.c_proj", "attention.output"),
        *norm("ln_2", "mlp_norm"),
        *linear("mlp.c_fc", "mlp.up"),
        *linear("mlp.c_proj", "mlp.down"),
    ),
)


def _read(config: Fields) -> ParsedConfig:
    hidden, heads = config.integer("n_embd"), config.integer("n_head")
    kv_heads = 1 if config.flag("multi_query", True) else heads
    config.only("num_key_value_heads", kv_heads)
    attention = multi_head(config, hidden, heads, kv_heads=kv_heads)
    if not config.flag("scale_attn_weights", True):
        attention = replace(attention, scale=1.0)
    layer = LayerConfig(
        norm=layer_norm(config, "layer_norm_epsilon"),
        attention=attention,
        mlp=plain_mlp(config, config.integer("n_inner", 4 * hidden), "activation_function", "gelu_pytorch_tanh"),
    )
    layers = (layer,) * layer_count(config, "n_layer")
    places = config.integer("n_positions")
    return ParsedConfig(config=model(config, "gpt_bigcode", hidden, layers, context=places, learned_positions=True))


_SERVING = (
    "inference_runner max_batch_size max_sequence_length pad_key_length pre_allocate_kv_cache validate_runner_input"
)

GPT_BIGCODE = Family(
    model_type="gpt_bigcode",
    architectures=("GPTBigCodeForCausalLM", "GPTBigCodeModel", "GPTBigCodeLMHeadModel"),
    read=_read,
    table=TABLE,
    ignored=dict.fromkeys(_SERVING.split(), "how one server ran the model"),
)
