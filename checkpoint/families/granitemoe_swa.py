"""Granite's mixtures with windows and attention sinks; each layer has a rotary base of its own, 0 for no rotation."""

from dataclasses import replace

from .. import rotary_fields
from ..family import Family, ParsedConfig
from ..fields import Fields
from ..llama_like import layer_count, layer_types, rotating, windows
from ..moe_fields import ROUTER_TRAINING
from ..rotary_fields import Rotation
from ..table import tensor
from .granite import SHARED_TABLE, read_experts


def _read(config: Fields) -> ParsedConfig:
    local = layer_types(config, [index % 4 != 0 for index in range(layer_count(config))])
    return read_experts(
        config,
        shared=config.integer("shared_intermediate_size", 0, least=0),
        sinks=True,
        windows=windows(config, local, config.optional_integer("sliding_window", 128)),
        rotations=_rotations(config, layer_count(config)),
    )


def _rotations(config: Fields, layers: int) -> list[Rotation | None]:
    """Return each layer's rotation; they differ in their bases only."""
    head = rotating(config)
    everywhere = rotary_fields.rotation(config, head)
    if not config.has("layer_rope_theta"):
        config.ignore(("layer_rope_theta",))
        return [everywhere] * layers
    bases = config.numbers("layer_rope_theta", zero=True)
    if len(bases) != layers:
        raise config.wrong("layer_rope_theta", f"a list of {layers} numbers, 0 for layers that do not rotate")
    by_base = {base: rotary_fields.rotation(config, head, base) for base in set(bases) if base}
    return [by_base.get(base) for base in bases]


GRANITE_MOE_SWA = Family(
    model_type="granitemoe_swa",
    architectures=("GraniteMoeSWAForCausalLM", "GraniteMoeSWAModel"),
    read=_read,
    table=replace(SHARED_TABLE, layer=(*SHARED_TABLE.layer, tensor("self_attn.sinks", "attention.sink_H"))),
    ignored=ROUTER_TRAINING,
)
