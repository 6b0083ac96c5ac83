"""LLaMA 1, 2 and 3, SmolLM, and Mistral: RMS norms, rotary positions, grouped heads, gated MLPs."""

from ..family import Family, ParsedConfig
from ..fields import Fields
from ..llama_like import LLAMA_TABLE, read


def _read_llama(config: Fields) -> ParsedConfig:
    config.only("rope_interleaved", False)
    bias = config.flag("attention_bias", False)
    return read(config, mlp_bias=config.flag("mlp_bias", False), attention={"qkv_bias": bias, "output_bias": bias})


def _read_mistral(config: Fields) -> ParsedConfig:
    return read(config, windows=config.optional_integer("sliding_window", 4096))


LLAMA = Family(
    model_type="llama",
    architectures=("LlamaForCausalLM", "LlamaModel"),
    read=_read_llama,
    table=LLAMA_TABLE,
    ignored={"is_llama_config": "written by one converter into every file"},
)

MISTRAL = Family(
    model_type="mistral",
    architectures=("MistralForCausalLM", "MistralModel"),
    read=_read_mistral,
    table=LLAMA_TABLE,
)
