"""Command R7B and A: Command R's, with windows; those layers alone rotate."""

from ...spec.config import RotaryLayout
from ..family import Family, ParsedConfig, alias
from ..fields import Fields
from ..llama_like import all_but_every, layer_count, layer_types, rotation_of, windows
from . import cohere


def _read(config: Fields) -> ParsedConfig:
    """All layers but every fourth have a window, and those alone rotate."""
    pattern = config.integer(alias(config, "sliding_window_pattern", "_sliding_window_pattern"), 4)
    config.only("layer_switch", pattern)
    config.only("order_of_interleaved_layers", "local_attn_first")
    config.only("use_qk_norm", False)
    local = layer_types(config, all_but_every(pattern, layer_count(config)))
    rotation = rotation_of(config, layout=RotaryLayout.INTERLEAVED)
    return cohere.read_cohere(
        config,
        qk_norm=False,
        rotations=[rotation if here else None for here in local],
        windows=windows(config, local, config.optional_integer("sliding_window", 4096)),
    )


COHERE2 = Family(
    model_type="cohere2",
    architectures=("Cohere2ForCausalLM", "Cohere2Model"),
    read=_read,
    table=cohere.TABLE,
    ignored=cohere.IGNORED,
)
