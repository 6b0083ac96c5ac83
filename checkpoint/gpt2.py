"""GPT-2: layer norms, learned positions, merged query-key-value projection, plain MLPs, tied head."""

from ..spec.config import AttentionConfig, Head, LayerConfig, MlpConfig, ModelConfig, NormConfig, NormKind
from .family import ACTIVATIONS, Family, Understood, head_size
from .fields import MOST_LAYERS, Fields
from .table import Ignorable, Stored, Table

_QKV = ("attention.query", "attention.key", "attention.value")

TABLE = Table(
    prefix="transformer.",
    embedding=(
        Stored(name="wte.weight", fills=("token_VE",)),
        Stored(name="wpe.weight", fills=("position_PM",)),
    ),
    layer=(
        Stored(name="h.{layer}.ln_1.weight", fills=("attention_norm.gain_M",)),
        Stored(name="h.{layer}.ln_1.bias", fills=("attention_norm.bias_M",)),
        Stored(name="h.{layer}.attn.c_attn.weight", fills=tuple(f"{name}.weight_NI" for name in _QKV), transposed=True),
        Stored(name="h.{layer}.attn.c_attn.bias", fills=tuple(f"{name}.bias_N" for name in _QKV)),
        Stored(name="h.{layer}.attn.c_proj.weight", fills=("attention.output.weight_NI",), transposed=True),
        Stored(name="h.{layer}.attn.c_proj.bias", fills=("attention.output.bias_N",)),
        Stored(name="h.{layer}.ln_2.weight", fills=("mlp_norm.gain_M",)),
        Stored(name="h.{layer}.ln_2.bias", fills=("mlp_norm.bias_M",)),
        Stored(name="h.{layer}.mlp.c_fc.weight", fills=("mlp.up.weight_NI",), transposed=True),
        Stored(name="h.{layer}.mlp.c_fc.bias", fills=("mlp.up.bias_N",)),
        Stored(name="h.{layer}.mlp.c_proj.weight", fills=("mlp.down.weight_NI",), transposed=True),
        Stored(name="h.{layer}.mlp.c_proj.bias", fills=("mlp.down.bias_N",)),
    ),
    head=(
        Stored(name="ln_f.weight", fills=("norm.gain_M",)),
        Stored(name="ln_f.bias", fills=("norm.bias_M",)),
        Stored(name="lm_head.weight", fills=("projection.weight_NI",)),
    ),
    ignorable=(
        Ignorable(name="h.{layer}.attn.bias", why="the causal mask, kept as a buffer; the same for every model"),
        Ignorable(name="h.{layer}.attn.masked_bias", why="the score that stood for minus infinity under that mask"),
    ),
)


def _read(config: Fields) -> Understood:
    hidden, heads = config.integer("n_embd"), config.integer("n_head")
    size = head_size(config, hidden, heads)
    norm = NormConfig(kind=NormKind.LAYER, epsilon=config.number("layer_norm_epsilon", 1e-5))
    mlp = MlpConfig(
        width=config.integer("n_inner", 4 * hidden),
        activation=config.choice("activation_function", ACTIVATIONS, "gelu_new"),
        gated=False,
        bias=True,
    )
    scale = size**-0.5 if config.flag("scale_attn_weights", True) else 1.0
    by_layer = config.flag("scale_attn_by_inverse_layer_idx", False)

    def layer(index: int) -> LayerConfig:
        attention = AttentionConfig(
            heads=heads,
            kv_heads=heads,
            head_size=size,
            scale=scale / (index + 1) if by_layer else scale,
            qkv_bias=True,
            output_bias=True,
        )
        return LayerConfig(norm=norm, attention=attention, mlp=mlp)

    model = ModelConfig(
        family="gpt2",
        hidden=hidden,
        vocabulary=config.integer("vocab_size"),
        context=config.integer("n_positions"),
        layers=tuple(layer(index) for index in range(config.integer("n_layer", most=MOST_LAYERS))),
        final_norm=norm,
        learned_positions=True,
        head=Head.TIED if config.flag("tie_word_embeddings", True) else Head.OWN,
    )
    return Understood(config=model, frequencies=(None,) * len(model.layers))


GPT2 = Family(
    model_type="gpt2",
    architectures=("GPT2LMHeadModel", "GPT2Model"),
    read=_read,
    table=TABLE,
    harmless=(
        "n_ctx",  # an older name of n_positions
        "reorder_and_upcast_attn",  # the same result, in another order and precision
        "summary_type",
        "summary_use_proj",
        "summary_activation",
        "summary_proj_to_labels",
        "summary_first_dropout",  # all of these: for classifiers
    ),
)
