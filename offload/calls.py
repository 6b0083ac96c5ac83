"""One call of a program, a layer at a time: so that several calls go through a layer while its weights are there.

The compiled path runs a prompt or a decode step through all layers before the next one begins. Here the loop is the
other way round, since it is the weights that are expensive: each layer is computed for all prompts and all rows of a
step, then the next. What is computed is the same, by the same pieces (`compiled.steps`), in the same order for each
sequence: the logits are the same to the bit. Before the layers rows of the table come from the disk, and after them the
head comes in blocks of rows; both have pieces of their own.

Shapes: R sequences that gain one token, T prompt tokens of one sequence, S key positions, M hidden, W table width, V
vocabulary, N rows of a block of the head.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..compiled.compute import accumulation_dtype
from ..compiled.embedding import Embedding, Product, embed
from ..compiled.head import head_prefill, scale_and_cap
from ..compiled.layers import Attend, Cache, layer_with
from ..compiled.linear import linear_decode, linear_prefill
from ..compiled.norms import Norm
from ..compiled.packing import Matrix
from ..compiled.programs import Program
from ..compiled.steps import (
    Parts,
    Piece,
    decode_parts,
    decode_positions,
    different_windows,
    for_projection,
    logits_of,
    prefill_parts,
    prefill_positions,
)
from ..compiled.weights import Head, Layer
from ..spec.config import LayerConfig, ModelConfig, Storage
from .cut_pieces import cut_pieces
from .cutting import NO_MATRIX, Feeding, Halfway, attended, lacks_mlp
from .form import Resident
from .kv_stream import Span


class StreamedProgram(NamedTuple):
    """The pieces of a program whose weights come and go."""

    enter: Callable[..., tuple[Tensor, Any]]
    """Takes the tokens' table, what stays in memory, and the call's inputs; returns x and what all layers share."""
    layer: Callable[..., Tensor]
    """As `compiled.steps.Parts` has it."""
    attention: Callable[..., Halfway]
    """As `layer`, up to the MLP, for a layer whose MLP has records of its own."""
    up: Callable[[LayerConfig, Tensor, Matrix], Tensor]
    down: Callable[[LayerConfig, Tensor, Matrix], Tensor]
    """Both take a block, and return some of their numbers for each token."""
    finish: Callable[[LayerConfig, Halfway, Tensor, Norm | None], Tensor]
    leave: Callable[[Tensor, Resident], Tensor]
    """Returns what the head multiplies."""
    score: Callable[[Tensor, Matrix], Tensor]
    """Returns the logits of a block of the head's rows."""
    product: Product
    """That of its layers."""


def streamed_program(
    name: Program, config: ModelConfig, storage: Storage, compute: torch.dtype, layers: Piece, others: Piece
) -> StreamedProgram:
    """Return the pieces of a program: `layers` makes those of layers, `others` those before and after them."""
    many, prefill = name is Program.DECODE_MANY, name is Program.PREFILL
    product = linear_prefill if many or prefill else linear_decode
    windows = different_windows(config)
    parts: Parts = (
        prefill_parts(config, storage, layers, compute=compute)
        if prefill
        else decode_parts(config, storage, layers, compute=compute, many=many)
    )

    def entered(token_T: Tensor, position_T: Tensor, table: Matrix, resident: Resident) -> Tensor:
        kept = resident.projection, resident.position_PM, resident.type_YM, resident.embedding_norm
        return embed(token_T, position_T, Embedding(table, *kept), config, storage, product, compute=compute)

    def enter_decode(table: Matrix, resident: Resident, step_3R: Tensor, slot_S: Tensor) -> tuple[Tensor, Any]:
        token_R, position_R, _ = step_3R.unbind()
        rotations = resident.rotations.different
        x_RM = entered(token_R, position_R, table, resident)
        return x_RM, decode_positions(rotations, windows, step_3R, slot_S, compute)

    def enter_prefill(
        table: Matrix, resident: Resident, token_T: Tensor, position_T: Tensor, start_1: Tensor, slot_S: Tensor
    ) -> tuple[Tensor, Any]:
        rotations = resident.rotations.different
        x_TM = entered(token_T, position_T, table, resident)
        return x_TM, prefill_positions(rotations, windows, position_T, start_1, slot_S, compute)

    def leave(x_TM: Tensor, resident: Resident) -> Tensor:
        head = Head(resident.head_norm, resident.reduction, NO_MATRIX)
        return for_projection(x_TM, head, config, storage, product)

    def score(hidden_RW: Tensor, block: Matrix) -> Tensor:
        return logits_of(hidden_RW, Head(None, None, block), config, storage, linear_prefill if many else linear_decode)

    rows = (0,) if many or prefill else ()
    enter: Callable[..., tuple[Tensor, Any]]
    if prefill:
        enter = others(enter_prefill, dict.fromkeys(("table", "token_T", "position_T", "slot_S"), (0,)))
    else:
        enter = others(enter_decode, {"table": (0,), "step_3R": (1,) if many else (), "slot_S": (0,)})
    return StreamedProgram(
        enter,
        parts.layer,
        *cut_pieces(config, storage, others, name),
        others(leave, {"x_TM": rows}),
        others(score, {"hidden_RW": (0,) if many else ()}),
        product,
    )


class Call:
    """A decode step of some rows, or a piece of a prompt, on its way through the layers."""

    def __init__(
        self,
        program: StreamedProgram,
        inputs: Sequence[Tensor],
        *,
        shared: Sequence[Tensor] = (),
        last_only: bool,
    ) -> None:
        """`inputs` are those of `enter`, `shared` what each layer gets besides; `last_only`: one row has logits."""
        self._program = program
        self._inputs, self._shared, self._last_only = inputs, shared, last_only
        self._x: Tensor | None = None
        self._positions: Any = None
        self._cut: tuple[LayerConfig, Feeding] | None = None
        self.hidden: Tensor | None = None
        self._blocks: list[Tensor] = []
        self._every: list[Tensor] = []

    @property
    def one_row_scored(self) -> bool:
        """Whether it is a piece of a prompt, of which the last position has logits."""
        return self._last_only

    def enter(self, table: Matrix, resident: Resident, numbers: Sequence[int] | None = None) -> None:
        """Embed the tokens from a table in which they have these numbers, by default their own."""
        first, *others = self._inputs
        if numbers is not None and first.ndim == 1:
            first = torch.tensor(numbers, device=first.device)
        elif numbers is not None:
            first = torch.stack([torch.tensor(numbers, device=first.device), *first[1:]])
        self._x, self._positions = self._program.enter(table, resident, first, *others)

    def layer(self, config: LayerConfig, weights: Layer, cache: Cache, place: int | None) -> None:
        """Go through a layer, up to its MLP where that has records of its own; `place` is that of its rotation."""
        given = config, self._x, weights, cache, place, self._positions, *self._shared
        if lacks_mlp(weights):
            self._feed(config, self._program.attention(*given))
        else:
            self._x = self._program.layer(*given)

    def layer_with(
        self, config: LayerConfig, weights: Layer, attend: Attend, place: int | None, storage: Storage
    ) -> None:
        """Do the same, uncompiled, for a layer whose keys and values are not in memory."""
        assert self._x is not None
        table = None if place is None else self._positions.tables[place]
        given: dict[str, Any] = {"config": config, "storage": storage, "product": self._program.product}
        if lacks_mlp(weights):
            self._feed(config, attended(self._x, weights, table, attend, **given))
        else:
            self._x = layer_with(self._x, weights, table, attend, **given)

    def _feed(self, config: LayerConfig, half: Halfway) -> None:
        program = self._program
        self._cut = config, Feeding(half, partial(program.up, config), partial(program.down, config))

    def up(self, block: Matrix) -> None:
        """Go through a block of an MLP's up."""
        assert self._cut is not None
        self._cut[1].up(block)

    def down(self, block: Matrix) -> None:
        """Go through a block of an MLP's down; all blocks of the up come before."""
        assert self._cut is not None
        self._cut[1].down(block)

    def finish(self, norm: Norm | None) -> None:
        """End a layer whose MLP had records of its own; `norm` is that of its output."""
        assert self._cut is not None
        config, feeding = self._cut
        self._x = self._program.finish(config, feeding.half, feeding.out_TM(), norm)
        self._cut = None

    def leave(self, resident: Resident) -> None:
        """Go through what stands between the layers and the head."""
        assert self._x is not None
        self.hidden = self._program.leave(self._x, resident)
        self._x = self._positions = None

    def score(self, block: Matrix, *, every: tuple[ModelConfig, Storage] | None = None) -> None:
        """Find the logits of a block of the head; with `every` those of all positions too."""
        assert self.hidden is not None
        scored = self.hidden[-1:].clone() if self._last_only else self.hidden
        self._blocks.append(self._program.score(scored, block))
        if every is not None:
            config, storage = every
            wide_TW = self.hidden.to(accumulation_dtype(self.hidden.dtype))
            logits = head_prefill(wide_TW, block, storage)
            self._every.append(scale_and_cap(logits, config.logit_scale, config.logit_softcap))

    def logits(self, vocabulary: int) -> Tensor:
        """Return the logits, [R, V], of the last position where that is the only one."""
        return torch.cat(self._blocks, 1)[:, :vocabulary]

    def every_logits(self, vocabulary: int) -> Tensor:
        """Return the logits of all positions, [T, V]."""
        return torch.cat(self._every, 1)[:, :vocabulary]


@dataclass(slots=True)
class Pending:
    """A call and where its logits belong."""

    call: Call
    tokens: list[int]
    rows: list[int]
    """The sequence of each row; those of a decode step that fill it up are the last one's again."""
    spans: list[Span]
    last: bool
    """Whether it is the last piece of its prompt, or a decode step."""
    nbytes: int


def in_sweeps(pending: Sequence[Pending], flight_bytes: int) -> Iterator[list[Pending]]:
    """Yield calls that go through the layers together: as many as there is room for, at least one."""
    together: list[Pending] = []
    for each in pending:
        if together and sum(one.nbytes for one in together) + each.nbytes > flight_bytes:
            yield together
            together = []
        together.append(each)
    if together:
        yield together
