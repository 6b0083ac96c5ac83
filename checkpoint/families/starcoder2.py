"""StarCoder 2: LLaMA's, but with layer norms, plain MLPs, and biases everywhere."""

from ..family import Family, ParsedConfig, alias, layer_norm
from ..fields import Fields
from ..llama_like import INPUT_NORMS, SPLIT_QKV, read, table
from ..table import linear

TABLE = table(
    *INPUT_NORMS,
    *SPLIT_QKV,
    *linear("self_attn.o_proj", "attention.output"),
    *linear("mlp.c_fc", "mlp.up"),
    *linear("mlp.c_proj", "mlp.down"),
)


def _read(config: Fields) -> ParsedConfig:
    config.only("mlp_type", "default")
    config.only("norm_type", "layer_norm")
    config.only("scale_attn_weights", True)
    bias = config.flag("use_bias", True)
    return read(
        config,
        norm=layer_norm(config, alias(config, "norm_epsilon", "layer_norm_epsilon")),
        gated=False,
        usual_activation="gelu_pytorch_tanh",
        mlp_bias=bias,
        tied=True,
        windows=config.optional_integer("sliding_window", None),
        attention={"qkv_bias": bias, "output_bias": bias},
    )


STARCODER2 = Family(
    model_type="starcoder2",
    architectures=("Starcoder2ForCausalLM", "Starcoder2Model"),
    read=_read,
    table=TABLE,
    ignored={
        "residual_dropout": "training",
        "embedding_dropout": "training",
        "rms_norm_eps": "of RMS norms, of which it has none",
    },
)
