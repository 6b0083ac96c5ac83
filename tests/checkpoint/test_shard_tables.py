"""Every source hands out a rank's share of a model: the elements that are the rank's own, and no more bytes."""

from collections.abc import Sequence
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
from twinfer.checkpoint.gguf.architectures import ARCHITECTURES
from twinfer.checkpoint.gguf.table import table as gguf_table
from twinfer.checkpoint.permutation import separated_thirds
from twinfer.checkpoint.plan import Buffers
from twinfer.checkpoint.source import FileSource
from twinfer.checkpoint.table import Experts, Heads, Stored, Table
from twinfer.oracle.case import RandomPicker
from twinfer.spec.config import (
    Head,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    NormKind,
    NormPlacement,
    Residual,
    RotaryConfig,
    RotaryLayout,
)
from twinfer.spec.moe import MoeConfig, RouterConfig, Score
from twinfer.spec.shapes import Shapes, embedding_shapes, head_shapes, is_buffer, layer_shapes

from ..shards import assert_reads_no_further, assert_shards_join, shareable

TABLES = (
    {family.model_type: family.table for family in FAMILIES}
    | {f"megatron_gpt {order}": megatron_table(reorder) for order, reorder in ORDERS.items()}
    | {f"gguf {name}": gguf_table(kind, ()) for name, kind in ARCHITECTURES.items() if kind.experts is not None}
)
UP = "mlp.experts.up.weight_ENI"
FORMS = [
    (name, form)
    for name, table in TABLES.items()
    for form in (0, -1)
    if form == 0 or sum(UP in entry.fills for entry in table.layer) > 1
]
"""Tables, and which entry is taken of several that fill the same: the first, or the last where experts have several."""
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

    sparse = UP in layer

    def fitted(index: int, each: LayerConfig) -> LayerConfig:
        attention = replace(
            each.attention,
            kv_heads=each.attention.heads if alike else each.attention.kv_heads,
            qkv_bias="attention.query.bias_N" in layer,
            output_bias="attention.output.bias_N" in layer,
            qk_norm=qk_norm if "attention.query_norm.gain_M" in layer else None,
            rotary=RotaryConfig(layout=RotaryLayout.HALF_SPLIT, size=2),
            alibi=True,
            sinks="attention.sink_H" in layer,
        )
        plain = replace(each.dense_mlp, gated="mlp.gate.weight_NI" in layer, bias="mlp.up.bias_N" in layer)
        mlp = mixture(each.dense_mlp, layer) if sparse and (index or "mlp.up.weight_NI" not in layer) else plain
        residual = Residual.PARALLEL_SHARED_NORM if shared else Residual.SEQUENTIAL
        return replace(each, norm=norm, attention=attention, mlp=mlp, norm_placement=placement, residual=residual)

    return replace(
        config,
        layers=tuple(fitted(*each) for each in enumerate(config.layers)),
        final_norm=norm if "norm.gain_M" in head else None,
        learned_positions="position_PM" in embedding,
        head=Head.UNTIED if "projection.weight_NI" in head else Head.NONE,
        head_bias="bias_V" in head,
        embedding_size=5 if "projection.weight_NI" in embedding else None,
        embedding_norm=norm if "norm.gain_M" in embedding else None,
        token_types=2 if "type_YM" in embedding else 0,
    )


def mixture(plain: MlpConfig, fills: set[str]) -> MoeConfig:
    """Experts with all that a table has beside them."""

    def of(name: str, bias: str = "bias_N") -> MlpConfig | None:
        if not any(each.startswith(f"mlp.{name}.up.") for each in fills):
            return None
        return replace(
            plain,
            gated=any(each.startswith(f"mlp.{name}.gate.") for each in fills),
            bias=f"mlp.{name}.up.{bias}" in fills,
        )

    expert = of("experts", "bias_EN")
    assert expert is not None
    chosen_with = "mlp.choice_bias_E" in fills
    router = RouterConfig(
        experts=3,
        top_k=2,
        score=Score.SIGMOID if chosen_with else Score.SOFTMAX,
        logit_bias="mlp.router.bias_N" in fills,
        choice_bias=chosen_with,
    )
    gated = "mlp.shared_gate.weight_NI" in fills
    return MoeConfig(router=router, expert=expert, shared=of("shared"), shared_gate=gated, residual=of("residual"))


def of_one_form(entries: tuple[Stored, ...], form: int) -> list[Stored]:
    """Of entries that fill the same, the first or the last."""
    kept: list[Stored] = []
    for entry in entries[:: 1 if form == 0 else -1]:
        if not any(set(entry.fills) & set(other.fills) for other in kept):
            kept.append(entry)
    return kept


def kept_experts(entry: Stored, shapes: list[tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The tensors of a map of experts."""
    count, inputs = shapes[0][0], shapes[0][2:]
    own = (sum(shape[1] for shape in shapes), *inputs)
    own = own[::-1] if entry.transposed else own
    if entry.experts is Experts.APART:
        return {entry.name.replace("{expert}", str(expert)): own for expert in range(count)}
    return {entry.name: (count * own[0], *own[1:]) if entry.experts is Experts.FLAT else (count, *own)}


def stored(entries: Sequence[Stored], shapes: Shapes, prefix: str, head_size: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a file that hold weights of these shapes."""
    found: dict[str, tuple[int, ...]] = {}
    for entry in entries:
        filled = [shapes[name] for name in entry.fills if name in shapes]
        if not filled:
            continue
        rows = sum(shape[0] for shape in filled) + (FIRST_POSITION if entry.fills == ("position_PM",) else 0)
        if entry.experts is not None:
            found |= {prefix + name: shape for name, shape in kept_experts(entry, filled).items()}
            continue
        name, shape = prefix + entry.name, (rows, *filled[0][1:])
        if entry.one_row:
            found[name] = 1, *shape
        elif "{head}" in name:
            found |= {name.replace("{head}", str(head)): (head_size,) for head in range(rows // head_size)}
        elif entry.heads is Heads.SHARED:
            found[name] = (head_size,)
        elif entry.heads is Heads.STACKED:
            found[name] = rows // head_size, head_size
        else:
            found[name] = shape[::-1] if entry.transposed else shape
    return found


def source_of(table: Table, config: ModelConfig, seed: int, form: int = 0) -> tuple[FileSource, Counting]:
    size = config.layers[0].attention.head_size
    shapes = stored(table.embedding, embedding_shapes(config), "", size)
    shapes |= stored(table.head, head_shapes(config), "", size)
    buffers = []
    for index, layer in enumerate(config.layers):
        wanted = layer_shapes(layer, config.hidden)
        shapes |= stored(of_one_form(table.layer, form), wanted, table.layers.format(layer=index), size)
        kept = {name: torch.rand(shape).double() for name, shape in wanted.items() if is_buffer(name)}
        buffers.append({name: partial(torch.clone, each) for name, each in kept.items()})
    generator = torch.Generator().manual_seed(seed)
    store = Counting({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})
    made = Buffers(layers=buffers, head={})
    return FileSource(config, table, store, made, first_position=FIRST_POSITION), store


@pytest.mark.parametrize(("name", "form"), FORMS)
@given(seed=st.integers(0, 2**31))
@settings(max_examples=2)
def test_every_family_s_files_are_shared_by_elements_and_read_no_further(name: str, form: int, seed: int) -> None:
    """Each rank gets its elements, also of merged, transposed and reordered tensors, and as many bytes are read.

    Of experts too: one by one, stacked, as rows of all, or interleaved.
    """
    table = TABLES[name]
    source, store = source_of(table, as_the_table_has_it(shareable(RandomPicker(seed)), table), seed, form)
    assert len(assert_shards_join(source)) >= 2
    assert_reads_no_further(source, store, table)
