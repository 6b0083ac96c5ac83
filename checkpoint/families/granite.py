"""Granite 3, dense: LLaMA's, with four factors, on tokens, scores, what layers add, and logits."""

from ..family import Family, ParsedConfig
from ..fields import Fields
from ..llama_like import LLAMA_TABLE, read


def _read(config: Fields) -> ParsedConfig:
    bias = config.flag("attention_bias", False)
    return read(
        config,
        mlp_bias=config.flag("mlp_bias", False),
        attention={
            "qkv_bias": bias,
            "output_bias": bias,
            "scale": config.number("attention_multiplier", 1.0),  # instead of the root of the head's size
        },
        layer={"residual_scale": config.number("residual_multiplier", 1.0)},
        model={
            "embedding_scale": config.number("embedding_multiplier", 1.0),
            "logit_scale": 1 / config.number("logits_scaling", 1.0),
        },
    )


GRANITE = Family(
    model_type="granite", architectures=("GraniteForCausalLM", "GraniteModel"), read=_read, table=LLAMA_TABLE
)
