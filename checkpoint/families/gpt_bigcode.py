"""GPT-BigCode (SantaCoder, StarCoder): GPT-2 with one key and value head for all queries, or with one for each.

With one for all, the merged projection stacks all queries, the key and the value; with one for each, it goes head by
head. The two are one order: that of groups of query heads, each with its key and value.
"""

from dataclasses import replace

from ...spec.config import AttentionConfig, LayerConfig, MlpConfig, ModelConfig
from ..family import ACTIVATIONS, Family, Understood, context, head, head_size, layer_norm
from ..fields import MOST_LAYERS, Fields
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


def _read(config: Fields) -> Understood:
    hidden, heads = config.integer("n_embd"), config.integer("n_head")
    size = head_size(config, hidden, heads)
    kv_heads = 1 if config.flag("multi_query", True) else heads
    config.only("num_key_value_heads", kv_heads)
    norm = layer_norm(config, "layer_norm_epsilon")
    attention = AttentionConfig(
        heads=heads,
        kv_heads=kv_heads,
        head_size=size,
        scale=size**-0.5 if config.flag("scale_attn_weights", True) else 1.0,
        qkv_bias=True,
        output_bias=True,
    )
    mlp = MlpConfig(
        width=config.integer("n_inner", 4 * hidden),
        activation=config.choice("activation_function", ACTIVATIONS, "gelu_pytorch_tanh"),
        gated=False,
        bias=True,
    )
    layer = LayerConfig(norm=norm, attention=attention, mlp=mlp)
    model = ModelConfig(
        family="gpt_bigcode",
        hidden=hidden,
        vocabulary=config.integer("vocab_size"),
        context=context(config, "n_positions"),
        layers=(layer,) * config.integer("n_layer", most=MOST_LAYERS),
        final_norm=norm,
        learned_positions=True,
        head=head(config, tied=True),
    )
    return Understood(config=model)


_PRECISION = "attention_softmax_in_fp32 scale_attention_softmax_in_fp32"
_SERVING = (
    "inference_runner max_batch_size max_sequence_length pad_key_length pre_allocate_kv_cache validate_runner_input"
)

GPT_BIGCODE = Family(
    model_type="gpt_bigcode",
    architectures=("GPTBigCodeForCausalLM", "GPTBigCodeModel", "GPTBigCodeLMHeadModel"),
    read=_read,
    table=TABLE,
    harmless=dict.fromkeys(_PRECISION.split(), "the same numbers, computed more or less precisely")
    | dict.fromkeys(_SERVING.split(), "how one server ran the model"),
)
