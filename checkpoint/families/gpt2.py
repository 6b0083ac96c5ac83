"""GPT-2: layer norms, learned positions, merged query-key-value projection, plain MLPs, tied head."""

from dataclasses import replace

from ...spec.config import LayerConfig
from ..family import Family, ParsedConfig, layer_norm
from ..fields import Fields
from ..gpt_like import layer_count, model, multi_head, plain_mlp
from ..table import QKV, Table, linear, masks, norm, output, tensor

TABLE = Table(
    prefix="transformer.",
    layers="h.{layer}.",
    embedding=(tensor("wte.weight", "token_VW"), tensor("wpe.weight", "position_PM")),
    layer=(
        *norm("ln_1", "attention_norm"),
        *linear("attn.c_attn", *QKV, transposed=True),
        *linear("attn.c_proj", "attention.output", transposed=True),
        *norm("ln_2", "mlp_norm"),
        *linear("mlp.c_fc", "mlp.up", transposed=True),
        *linear("mlp.c_proj", "mlp.down", transposed=True),
    ),
    head=(*norm("ln_f", "norm"), *output("lm_head")),
    ignorable=masks("h.{layer}.attn"),
)


def _read(config: Fields) -> ParsedConfig:
    hidden, heads = config.integer("n_embd"), config.integer("n_head")
    norm = layer_norm(config, "layer_norm_epsilon")
    mlp = plain_mlp(config, config.integer("n_inner", 4 * hidden), "activation_function", "gelu_new")
    attention = multi_head(config, hidden, heads)
    if not config.flag("scale_attn_weights", True):
        attention = replace(attention, scale=1.0)
    by_layer = config.flag("scale_attn_by_inverse_layer_idx", False)

    def layer(index: int) -> LayerConfig:
        scale = attention.scale / (index + 1) if by_layer else attention.scale
        return LayerConfig(norm=norm, attention=replace(attention, scale=scale), mlp=mlp)

    layers = tuple(layer(index) for index in range(layer_count(config, "n_layer")))
    places = config.integer("n_positions")
    return ParsedConfig(config=model(config, "gpt2", hidden, layers, context=places, learned_positions=True))


GPT2 = Family(
    model_type="gpt2",
    architectures=("GPT2LMHeadModel", "GPT2Model"),
    read=_read,
    table=TABLE,
    ignored={"n_ctx": "an older name of n_positions", "reorder_and_upcast_attn": "the same sums in another order"},
)
