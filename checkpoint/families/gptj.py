"""GPT-J: attention and MLP side by side behind one norm, interleaved rotary positions, a head with bias."""

from ...spec.config import LayerConfig, Residual, RotaryConfig, RotaryLayout
from .. import rotary
from ..family import Family, ParsedConfig, head_size, layer_norm
from ..fields import Fields
from ..gpt_like import layer_count, model, multi_head, plain_mlp
from ..rotary_fields import Rotation
from ..table import Table, linear, masks, norm, output, tensor

TABLE = Table(
    prefix="transformer.",
    layers="h.{layer}.",
    embedding=(tensor("wte.weight", "token_VW"),),
    layer=(
        *norm("ln_1", "attention_norm"),
        *linear("attn.q_proj", "attention.query"),
        *linear("attn.k_proj", "attention.key"),
        *linear("attn.v_proj", "attention.value"),
        *linear("attn.out_proj", "attention.output"),
        *linear("mlp.fc_in", "mlp.up"),
        *linear("mlp.fc_out", "mlp.down"),
    ),
    head=(*norm("ln_f", "norm"), *output("lm_head")),
    ignorable=masks("h.{layer}.attn"),
)


def _read(config: Fields) -> ParsedConfig:
    config.only("rotary", True)
    config.only("scale_attn_weights", True)
    hidden, heads = config.integer("n_embd"), config.integer("n_head")
    size, turning = head_size(config, hidden, heads), config.optional_integer("rotary_dim", 64)
    if turning is None or turning % 2 or turning > size:
        raise config.wrong("rotary_dim", f"an even number, at most the {size} elements of a head")
    rotation = Rotation(
        config=RotaryConfig(layout=RotaryLayout.INTERLEAVED, size=turning),
        frequency_J=rotary.frequencies(10000.0, turning),
    )
    layer = LayerConfig(
        norm=layer_norm(config, "layer_norm_epsilon"),
        attention=multi_head(config, hidden, heads, bias=False, rotary=rotation.config),
        mlp=plain_mlp(config, config.integer("n_inner", 4 * hidden), "activation_function", "gelu_new"),
        residual=Residual.PARALLEL_SHARED_NORM,
    )
    layers, places = (layer,) * layer_count(config, "n_layer"), config.integer("n_positions")
    parsed = model(config, "gptj", hidden, layers, tied=False, context=places, head_bias=True)
    return ParsedConfig(config=parsed, rotations=(rotation,) * len(layers))


GPTJ = Family(
    model_type="gptj",
    architectures=("GPTJForCausalLM", "GPTJModel"),
    read=_read,
    table=TABLE,
    ignored={"n_ctx": "an older name of n_positions"},
)
