"""GPT-J: attention and MLP side by side behind one norm, interleaved rotary positions, a head with bias."""

from ...spec.config import AttentionConfig, LayerConfig, MlpConfig, ModelConfig, Residual, RotaryConfig, RotaryLayout
from .. import rotary
from ..family import ACTIVATIONS, Family, Understood, context, head, head_size, layer_norm
from ..fields import MOST_LAYERS, Fields
from ..rotary_fields import Rotation
from ..table import Ignorable, Table, linear, norm, output, tensor

TABLE = Table(
    prefix="transformer.",
    layers="h.{layer}.",
    embedding=(tensor("wte.weight", "token_VE"),),
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
    ignorable=(
        Ignorable(name="h.{layer}.attn.bias", why="the causal mask, kept as a buffer; the same for every model"),
        Ignorable(name="h.{layer}.attn.masked_bias", why="the score that stood for minus infinity under that mask"),
    ),
)


def _read(config: Fields) -> Understood:
    config.only("rotary", True)
    config.only("scale_attn_weights", True)
    hidden, heads, layers = (
        config.integer("n_embd"),
        config.integer("n_head"),
        config.integer("n_layer", most=MOST_LAYERS),
    )
    size, turning = head_size(config, hidden, heads), config.optional_integer("rotary_dim", 64)
    if turning is None or turning % 2 or turning > size:
        raise config.wrong("rotary_dim", f"an even number, at most the {size} elements of a head")
    rotation = Rotation(
        config=RotaryConfig(layout=RotaryLayout.INTERLEAVED, size=turning),
        frequency_J=rotary.frequencies(10000.0, turning),
    )
    norm = layer_norm(config, "layer_norm_epsilon")
    layer = LayerConfig(
        norm=norm,
        attention=AttentionConfig(
            heads=heads, kv_heads=heads, head_size=size, scale=size**-0.5, rotary=rotation.config
        ),
        mlp=MlpConfig(
            width=config.integer("n_inner", 4 * hidden),
            activation=config.choice("activation_function", ACTIVATIONS, "gelu_new"),
            gated=False,
            bias=True,
        ),
        residual=Residual.PARALLEL_SHARED_NORM,
    )
    model = ModelConfig(
        family="gptj",
        hidden=hidden,
        vocabulary=config.integer("vocab_size"),
        context=context(config, "n_positions"),
        layers=(layer,) * layers,
        final_norm=norm,
        learned_positions=False,
        head=head(config, tied=False),
        head_bias=True,
    )
    return Understood(config=model, rotations=(rotation,) * layers)


GPTJ = Family(
    model_type="gptj",
    architectures=("GPTJForCausalLM", "GPTJModel"),
    read=_read,
    table=TABLE,
    harmless={"n_ctx": "an older name of n_positions"},
)
