"""GPT-2: layer norms, learned positions, merged query-key-value projection, plain MLPs, tied head."""

from ...spec.config import AttentionConfig, LayerConfig, MlpConfig, ModelConfig
from ..family import ACTIVATIONS, Family, Understood, context, head, head_size, layer_norm
from ..fields import MOST_LAYERS, Fields
from ..table import QKV, Ignorable, Table, linear, norm, output, tensor

TABLE = Table(
    prefix="transformer.",
    layers="h.{layer}.",
    embedding=(tensor("wte.weight", "token_VE"), tensor("wpe.weight", "position_PM")),
    layer=(
        *norm("ln_1", "attention_norm"),
        *linear("attn.c_attn", *QKV, transposed=True),
        *linear("attn.c_proj", "attention.output", transposed=True),
        *norm("ln_2", "mlp_norm"),
        *linear("mlp.c_fc", "mlp.up", transposed=True),
        *linear("mlp.c_proj", "mlp.down", transposed=True),
    ),
    head=(*norm("ln_f", "norm"), *output("lm_head")),
    ignorable=(
        Ignorable(name="h.{layer}.attn.bias", why="the causal mask, kept as a buffer; the same for every model"),
        Ignorable(name="h.{layer}.attn.masked_bias", why="the score that stood for minus infinity under that mask"),
    ),
)


def _read(config: Fields) -> Understood:
    hidden, heads = config.integer("n_embd"), config.integer("n_head")
    size = head_size(config, hidden, heads)
    norm = layer_norm(config, "layer_norm_epsilon")
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
        context=context(config, "n_positions"),
        layers=tuple(layer(index) for index in range(config.integer("n_layer", most=MOST_LAYERS))),
        final_norm=norm,
        learned_positions=True,
        head=head(config, tied=True),
    )
    return Understood(config=model)


GPT2 = Family(
    model_type="gpt2",
    architectures=("GPT2LMHeadModel", "GPT2Model"),
    read=_read,
    table=TABLE,
    harmless={"n_ctx": "an older name of n_positions", "reorder_and_upcast_attn": "the same sums in another order"},
)
