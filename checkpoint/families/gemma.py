"""Gemma: LLaMA's, with gains stored as their distance from 1, tokens scaled by the root of the hidden size, tied."""

from typing import Any

from ...spec.config import Activation
from ..family import ACTIVATIONS, Family, ParsedConfig, rms_norm
from ..fields import Fields
from ..llama_like import LLAMA_TABLE, read


def read_gemma(config: Fields, *, attention: dict[str, Any], model: dict[str, Any], **differences: Any) -> ParsedConfig:
    """What all Gemmas share; the keywords as `llama_like.read` has them."""
    config.only("use_bidirectional_attention", False, None)
    bias = config.flag("attention_bias", False)
    return read(
        config,
        norm=rms_norm(config, from_one=True),
        size=256,
        tied=True,
        attention={"qkv_bias": bias, "output_bias": bias, **attention},
        model={"embedding_scale": config.integer("hidden_size") ** 0.5, **model},
        **differences,
    )


def _read(config: Fields) -> ParsedConfig:
    # The first files say "gelu", though the models were trained with the approximation; later ones say so apart.
    names = ACTIVATIONS | {"gelu": Activation.GELU_TANH}
    activation = config.choice("hidden_act", names, "gelu_pytorch_tanh")
    newer = config.optional_text("hidden_activation")
    if newer is not None and ACTIVATIONS.get(newer) is not activation:
        raise config.wrong(
            "hidden_activation", "null, or what hidden_act means, where gelu stands for its approximation"
        )
    return read_gemma(config, attention={}, model={}, mlp={"activation": activation})


GEMMA = Family(
    model_type="gemma",
    architectures=("GemmaForCausalLM", "GemmaModel"),
    read=_read,
    table=LLAMA_TABLE,
)
