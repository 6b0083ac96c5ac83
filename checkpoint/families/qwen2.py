"""Qwen 1.5, 2 and 2.5: LLaMA's, with biases of queries, keys and values; windows in the last layers, if any."""

from ..family import Family, ParsedConfig
from ..fields import Fields
from ..llama_like import LLAMA_TABLE, layer_count, read, switched_windows


def windows(config: Fields) -> list[int | None]:
    """Of each layer: the first `max_window_layers` have none, unless `layer_types` says it otherwise."""
    first = config.integer("max_window_layers", 28, least=0)
    return switched_windows(config, [index >= first for index in range(layer_count(config))], 4096)


def _read(config: Fields) -> ParsedConfig:
    config.only("use_mrope", False)
    return read(config, windows=windows(config), attention={"qkv_bias": True})


QWEN2 = Family(model_type="qwen2", architectures=("Qwen2ForCausalLM", "Qwen2Model"), read=_read, table=LLAMA_TABLE)
