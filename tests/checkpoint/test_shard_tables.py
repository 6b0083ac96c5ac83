"""Every source hands out a rank's share of a model: the elements that are the rank's own, and no more bytes."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twinfer.checkpoint.families import FAMILIES
from twinfer.checkpoint.families.megatron_gpt import ORDERS
from twinfer.checkpoint.families.megatron_gpt import _table as megatron_table
from twinfer.checkpoint.permutation import separated_thirds
from twinfer.checkpoint.plan import Buffers
from twinfer.checkpoint.source import FileSource
from twinfer.checkpoint.table import Heads, Stored, Table
from twinfer.oracle.case import RandomPicker
from twinfer.spec.config import (
    Head,
    LayerConfig,
    ModelConfig,
    NormConfig,
    NormKind,
    NormPlacement,
    Residual,
    RotaryConfig,
    RotaryLayout,
)
from twinfer.spec.shapes import Shapes, embedding_shapes, head_shapes, is_buffer, layer_shapes

from ..shards import assert_reads_no_further, assert_shards_join, shareable

TABLES = {
    family.model_type: family.table
    for family in FAMILIES
    if any("mlp.up.weight_NI" in entry.fills for entry in family.table.layer)  # others: tests/families/test_mixtures.py
} | {f"megatron_gpt {order}": megatron_table(reorder) for order, reorder in ORDERS.items()}
FIRST_POSITION = 2


@dataclass
class Counting:
    """A store in memory that counts the bytes it hands out."""

    held: dict[str, Tensor]
    where: str = "memory"
    bytes: int = 0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.held.items()}

    def unreadable(self, name: str) -> str | None:
        return None

    def read(self, name: str) -> Tensor:
        return self._counted(self.held[name])

    def read_slice(self, name: str, cuts: tuple[slice, ...]) -> Tensor:
        return self._counted(self.held[name][cuts])

    def _counted(self, tensor: Tensor) -> Tensor:
        self.bytes += tensor.nbytes
        return tensor


def as_the_table_has_it(config: ModelConfig, table: Table) -> ModelConfig:
    """The config, with every tensor that a family's files may hold, and none that they never hold."""
    layer, embedding, head = (
        {name for entry in entries for name in entry.fills} for entries in (table.layer, table.embedding, table.head)
    )
    norm = NormConfig(kind=NormKind.LAYER, epsilon=1e-5)
    qk_norm = replace(norm, bias="attention.query_norm.bias_M" in layer)
    alike = any(entry.reorder is separated_thirds for entry in table.layer)  # an order for equally many heads of each
    shared = "mlp_norm.gain_M" not in layer and "attention_norm.gain_M" in layer
    placement = NormPlacement.PRE_NORM
    if "attention_output_norm.gain_M" in layer:
        placement = NormPlacement.SANDWICH_NORM if "attention_norm.gain_M" in layer else NormPlacement.POST_NORM

    def fitted(each: LayerConfig) -> LayerConfig:
        attention = replace(
            each.attention,
            kv_heads=each.attention.heads if alike else each.attention.kv_heads,
            qkv_bias="attention.query.bias_N" in layer,
            output_bias="attention.output.bias_N" in layer,
            qk_norm=qk_norm if "attention.query_norm.gain_M" in layer else None,
            rotary=RotaryConfig(layout=RotaryLayout.HALF_SPLIT, size=2),
            alibi=True,
        )
        mlp = replace(each.mlp, gated="mlp.gate.weight_NI" in layer, bias="mlp.up.bias_N" in layer)
        residual = Residual.PARALLEL_SHARED_NORM if shared else Residual.SEQUENTIAL
        return replace(each, norm=norm, attention=attention, mlp=mlp, norm_placement=placement, residual=residual)

    return replace(
        config,
        layers=tuple(fitted(each) for each in config.layers),
        final_norm=norm if "norm.gain_M" in head else None,
        learned_positions="position_PM" in embedding,
        head=Head.UNTIED if "projection.weight_NI" in head else Head.NONE,
        head_bias="bias_V" in head,
        embedding_size=5 if "projection.weight_NI" in embedding else None,
        embedding_norm=norm if "norm.gain_M" in embedding else None,
        token_types=2 if "type_YM" in embedding else 0,
    )


def stored(entries: tuple[Stored, ...], shapes: Shapes, prefix: str, head_size: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a file that hold weights of these shapes."""
    found: dict[str, tuple[int, ...]] = {}
    for entry in entries:
        filled = [shapes[name] for name in entry.fills if name in shapes]
        if not filled:
            continue
        rows = sum(shape[0] for shape in filled) + (FIRST_POSITION if entry.fills == ("position_PM",) else 0)
        name, shape = prefix + entry.name, (rows, *filled[0][1:])
        if "{head}" in name:
            found |= {name.replace("{head}", str(head)): (head_size,) for head in range(rows // head_size)}
        elif entry.heads is Heads.SHARED:
            found[name] = (head_size,)
        elif entry.heads is Heads.STACKED:
            found[name] = rows // head_size, head_size
        else:
            found[name] = shape[::-1] if entry.transposed else shape
    return found


def source_of(table: Table, config: ModelConfig, seed: int) -> tuple[FileSource, Counting]:
    size = config.layers[0].attention.head_size
    shapes = stored(table.embedding, embedding_shapes(config), "", size)
    shapes |= stored(table.head, head_shapes(config), "", size)
    buffers = []
    for index, layer in enumerate(config.layers):
        wanted = layer_shapes(layer, config.hidden)
        shapes |= stored(table.layer, wanted, table.layers.format(layer=index), size)
        kept = {name: torch.rand(shape).double() for name, shape in wanted.items() if is_buffer(name)}
        buffers.append({name: partial(torch.clone, each) for name, each in kept.items()})
    generator = torch.Generator().manual_seed(seed)
    store = Counting({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})
    made = Buffers(layers=buffers, head={})
    return FileSource(config, table, store, made, first_position=FIRST_POSITION), store


@pytest.mark.parametrize("name", TABLES)
@given(seed=st.integers(0, 2**31))
@settings(max_examples=4)
def test_every_family_s_files_are_shared_by_elements_and_read_no_further(name: str, seed: int) -> None:
    """Each rank gets its elements, also of merged, transposed and reordered tensors, and as many bytes are read."""
    table = TABLES[name]
    source, store = source_of(table, as_the_table_has_it(shareable(RandomPicker(seed)), table), seed)
    assert len(assert_shards_join(source)) >= 2
    assert_reads_no_further(source, store, table)
