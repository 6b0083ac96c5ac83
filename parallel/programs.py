"""A rank's programs: its pieces, called one after the other, with the collectives between them.

Rows that only fill up a pass over the weights are not reduced: what they would sum up to is copied from the row that
they repeat. So the wire carries what the sequences need, and a filling row stays equal to its original, into whose
slot of the cache it writes once more.

Pieces of prompts go through the layers in pairs, by turns: a piece's work stops wherever it has begun a sum, and waits
for the sum only when the other's work has stopped. So each sum is on its way while the other piece is computed. The
later piece of a prompt is one stop behind, so it finds the keys and values of the one before in every layer.

On a CPU a step is recorded (`RankGraphs`), and each collective in it is one call of the record. So is the way of rows
to their experts and back, since how many arrive is read in its midst: the record stops there, and goes on with as many
rows as left. A step is recorded with the wire muted and then replayed, so a rank sends the same whether it records,
moves a record or has one.

Shapes: R sequences that gain one token, T tokens of one sequence, S key positions, M hidden, W table width,
V vocabulary.
"""

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..compiled.compute import accumulation_dtype
from ..compiled.cpu_graph import CpuGraph, CpuGraphs, call_whole
from ..compiled.head import head_prefill, scale_and_cap
from ..compiled.layers import Attend, Cache
from ..compiled.moe import Moe
from ..compiled.programs import Program
from ..compiled.steps import Piece
from ..compiled.weights import Head, Layer, Model
from ..spec.config import LayerConfig, Residual
from ..spec.moe import MoeConfig
from .experts import ExpertPieces, filled_up, serve
from .mixtures import MixturePieces
from .pieces import LayerPieces, rank_pieces
from .weights import Share
from .wire import Pending, Wire

Work = Generator[None, None, Tensor]
"""Computing that stops where it has begun a sum and would have to wait for it; what it returns is the result."""


class Tokens(NamedTuple):
    """What passes through the layers at once: one token of several sequences, or several tokens of one."""

    token_T: Tensor
    position_T: Tensor
    start_T: Tensor
    """The first slots of the sequences."""
    slot_S: Tensor
    rows: int
    """Rows before those that only fill up."""


class RankProgram:
    """One program of one rank. `served` multiplies rows that arrive; `on_layer` is called after each layer.

    The MLPs of layers in `cut` are not fed here.
    """

    def __init__(
        self,
        name: Program,
        share: Share,
        vocabulary: int,
        wire: Wire,
        piece: Piece,
        served: Mapping[MoeConfig, ExpertPieces],
        on_layer: Callable[[], None],
        *,
        cut: Collection[LayerConfig] = (),
    ) -> None:
        model = share.model
        self._decodes = name is not Program.PREFILL
        self._share, self._wire, self._served, self._on_layer = share, wire, served, on_layer
        self._vocabulary = vocabulary
        self._steps: dict[int | None, Callable[..., Tensor]] = {}
        given = share.config, wire.groups.parallel, model.storage, piece, model.compute
        self._pieces = rank_pieces(name, *given, cut)

    def step_of(self, filled: int | None) -> Callable[..., Tensor]:
        """Return a function (model, caches, step_3R, slot_S) that runs a step; the same one each time.

        Of its rows only so many are of different sequences, all if None; step_3R has tokens, positions, first slots.
        """

        def step(_: Model, caches: Sequence[Cache], step_3R: Tensor, slot_S: Tensor) -> Tensor:
            rows = step_3R.shape[1] if filled is None else filled
            token_R, position_R, start_R = step_3R.unbind()
            return self.run(caches, Tokens(token_R, position_R, start_R, slot_S, rows))

        return self._steps.setdefault(filled, step)

    def run(self, caches: Sequence[Cache], tokens: Tokens) -> Tensor:
        """Do this stage's part; returns logits on the last stage, else what leaves the last layer."""
        return by_turns([self.work(caches, tokens)])[0]

    def work(self, caches: Sequence[Cache], tokens: Tokens, *, ends: bool = True, every_position: bool = False) -> Work:
        """Do the same with stops, for every position if that is wanted; no logits follow where nothing ends."""
        groups = self._wire.groups
        x = (yield from self.begin(tokens)) if groups.place.stage == 0 else self.received(tokens)
        x = yield from self.through(x, caches, tokens)
        if groups.place.stage + 1 < groups.parallel.pipeline:
            call_whole(self._send_on, x[: tokens.rows])
            return x
        return self.end(x, tokens, every_position) if ends else x

    def received(self, tokens: Tokens) -> Tensor:
        """Return what the stage before sends."""
        model, neighbor = self._share.model, self._wire.groups.neighbor(-1)
        room_TM = torch.empty(len(tokens.token_T), self._share.config.hidden, dtype=model.compute, device=model.device)
        x_TM: Tensor = call_whole(self._wire.receive, room_TM, tokens.rows, neighbor)
        return x_TM

    def _send_on(self, x_TM: Tensor) -> None:
        """Send a copy: a replay writes into the same memory again, perhaps before this is on its way."""
        self._wire.send(x_TM.clone() if self._decodes else x_TM, self._wire.groups.neighbor(1))

    def begin(self, tokens: Tokens) -> Work:
        """Return the rows of the token table [T, W], on the first stage."""
        model = self._share.model
        assert model.embedding is not None
        part_TW = self._pieces.lookup(model.embedding.table, self._share.first_token_1, tokens.token_T)
        return (yield from self._summed(part_TW, tokens))

    def through(self, x: Tensor, caches: Sequence[Cache], tokens: Tokens) -> Work:
        """Pass through the layers of the stage: x is rows of the token table, or what left the stage before."""
        x_TM, positions = self.enter(x, tokens)
        for index, (weights, cache) in enumerate(zip(self._share.model.layers, caches, strict=True)):
            x_TM = yield from self.layer(index, x_TM, weights, cache, positions, tokens)
        return x_TM

    def enter(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, Any]:
        """Return what the stage's first layer reads, and what all its layers have in common."""
        model = self._share.model
        given = tokens.position_T, tokens.start_T, tokens.slot_S
        first = model.embedding is not None
        x_TM, positions = self._pieces.entry(x if first else None, model.embedding, model.rotations.different, *given)
        return x if x_TM is None else x_TM, positions

    def pass_layer(
        self, index: int, x_TM: Tensor, weights: Layer, cache: Cache | Attend, positions: Any, tokens: Tokens
    ) -> Tensor:
        """Pass through one layer of the stage."""
        return by_turns([self.layer(index, x_TM, weights, cache, positions, tokens)])[0]

    def layer(
        self, index: int, x_TM: Tensor, weights: Layer, cache: Cache | Attend, positions: Any, tokens: Tokens
    ) -> Work:
        """Do the same with stops."""
        x_TM, part_TM = yield from self._attended(index, x_TM, weights, cache, positions, tokens)
        x_TM = yield from self._fed(self._share.config.layers[index], x_TM, part_TM, weights, tokens)
        self._on_layer()
        return x_TM

    def attend(
        self, index: int, x_TM: Tensor, weights: Layer, cache: Cache | Attend, positions: Any, tokens: Tokens
    ) -> tuple[Tensor, Tensor]:
        """Return what is added to, and this rank's part of attention's output, or of that and the MLP's in parallel."""
        return by_turns([self._attended(index, x_TM, weights, cache, positions, tokens)])[0]

    def _attended(
        self, index: int, x_TM: Tensor, weights: Layer, cache: Cache | Attend, positions: Any, tokens: Tokens
    ) -> Generator[None, None, tuple[Tensor, Tensor]]:
        """Do the same with stops."""
        layer, place = self._share.config.layers[index], self._share.model.rotations.of_layer[index]
        table = None if place is None else positions.tables[place]
        mask = positions.masks[self._pieces.windows.index(layer.attention.window)]
        writes = (positions.write_R, positions.position_R) if self._decodes else (positions.write_T,)
        slot_S = tokens.slot_S if self._decodes else positions.read_S
        pieces = self._attending(layer, cache)
        heads = yield from self._heads(pieces, x_TM, weights, tokens)
        stream_TM, part_TM = pieces.attend(x_TM, *heads, weights, cache, table, writes, slot_S, mask)
        return x_TM if stream_TM is None else stream_TM, part_TM

    def idle(self) -> None:
        """Take part in the exchanges of other data groups, without tokens of its own."""
        for index, weights in enumerate(self._share.model.layers):
            self.idle_layer(index, weights)

    def idle_layer(self, index: int, weights: Layer) -> None:
        """Take part in those of one layer."""
        model, config = self._share.model, self._share.config
        layer = config.layers[index]
        if isinstance(layer.mlp, MoeConfig) and isinstance(weights.mlp, Moe):
            x_TM = torch.zeros(0, config.hidden, dtype=model.compute, device=model.device)
            expert_TK = torch.zeros(0, layer.mlp.router.top_k, dtype=torch.int64, device=model.device)
            serve(x_TM, expert_TK, weights.mlp, layer.mlp, self._served[layer.mlp], self._wire)
            self._on_layer()

    def end(self, x_TM: Tensor, tokens: Tokens, every_position: bool) -> Tensor:
        """Return logits on the last stage, [R, V]: of every row of a step, of a prefill's last token or of all."""
        head = self._share.model.head
        assert head is not None
        return self.gathered(self.scored(x_TM, head, tokens, every_position))

    def scored(self, x_TM: Tensor, head: Head, tokens: Tokens, every_position: bool) -> Tensor:
        """Return the products with this rank's rows of the head, or with some of them."""
        hidden_TW, part_RV = self._pieces.last(x_TM, head)
        if self._decodes:
            return part_RV[: tokens.rows]
        if every_position:
            wide_TW = hidden_TW.to(accumulation_dtype(hidden_TW.dtype))
            return head_prefill(wide_TW, head.projection, self._share.model.storage)
        return part_RV

    def gathered(self, part_RV: Tensor) -> Tensor:
        """Return logits, of all ranks' products."""
        config = self._share.config
        counted = len(part_RV) * self._share.tokens * part_RV.element_size()
        all_RV = call_whole(self._wire.all_gather, part_RV, self._wire.groups.tensor, counted)
        logits_RV = all_RV[:, : self._vocabulary]
        return scale_and_cap(logits_RV, config.logit_scale, config.logit_softcap).contiguous()

    def _attending(self, layer: LayerConfig, cache: Cache | Attend) -> LayerPieces:
        """Return the pieces that attend to a cache."""
        return self._pieces.layers[layer]

    def _fed(self, layer: LayerConfig, x_TM: Tensor, part_TM: Tensor, weights: Layer, tokens: Tokens) -> Work:
        """End a layer after its attention."""
        pieces = self._pieces.layers[layer]
        if pieces.mixture is not None:
            return self._experts(pieces.mixture, layer, x_TM, part_TM, weights, tokens)
        if pieces.feed is not None:
            stream_TM, part_TM = pieces.feed(x_TM, (yield from self._summed(part_TM, tokens)), weights)
            assert stream_TM is not None
            x_TM = stream_TM
        return pieces.close(x_TM, (yield from self._summed(part_TM, tokens)), weights)

    def _experts(
        self,
        pieces: MixturePieces,
        layer: LayerConfig,
        x_TM: Tensor,
        part_TM: Tensor,
        weights: Layer,
        tokens: Tokens,
    ) -> Tensor:
        """End a layer with experts: sums that nothing waits for yet are on their way while the rows are."""
        assert isinstance(weights.mlp, Moe)
        assert isinstance(layer.mlp, MoeConfig)
        attended = self._start_reduce(part_TM, tokens)
        sequential = layer.residual is Residual.SEQUENTIAL
        chosen = pieces.choose(x_TM, attended() if sequential else None, weights)
        sums = [
            None if each is None else self._start_reduce(each, tokens)
            for each in (chosen.shared_TM, chosen.residual_TM)
        ]
        if chosen.routing is None:
            returned = chosen.served_TM
        else:
            given = chosen.read_TM[: tokens.rows], chosen.routing.expert_TK[: tokens.rows], len(x_TM)
            returned = call_whole(self._serve, *given, weights.mlp, layer.mlp)
        return pieces.finish(
            x_TM if chosen.stream_TM is None else chosen.stream_TM,
            chosen.read_TM,
            returned,
            None if chosen.routing is None else chosen.routing.weight_TK,
            *(None if each is None else each() for each in sums),
            None if sequential else attended(),
            weights,
        )

    def _serve(self, x_TM: Tensor, expert_TK: Tensor, count: int, weights: Moe, config: MoeConfig) -> Tensor:
        """Return what experts make of each row, filled up to so many rows, [count, K, M]."""
        returned_TKM = serve(x_TM, expert_TK, weights, config, self._served[config], self._wire)
        return filled_up(returned_TKM, count)

    def _heads(
        self, pieces: LayerPieces, x_TM: Tensor, weights: Layer, tokens: Tokens
    ) -> Generator[None, None, tuple[()] | tuple[Tensor, tuple[Tensor, Tensor]]]:
        """Return projected heads with their sums of squares over all ranks, where they are normed over all."""
        if pieces.project is None:
            return ()
        qkv_TGD, (query_T1, key_T1) = pieces.project(x_TM, weights)
        if pieces.center is not None:
            reduced = (yield from self._summed(query_T1, tokens)), (yield from self._summed(key_T1, tokens))
            qkv_TGD, (query_T1, key_T1) = pieces.center(qkv_TGD, reduced)
        return qkv_TGD, ((yield from self._summed(query_T1, tokens)), (yield from self._summed(key_T1, tokens)))

    def reduced(self, part_TM: Tensor, tokens: Tokens) -> Tensor:
        """Return the sum over the tensor group."""
        return self._start_reduce(part_TM, tokens)()

    def _summed(self, part_TM: Tensor, tokens: Tokens) -> Work:
        """Do the same with a stop: the sum is on its way until this goes on."""
        wait = self._start_reduce(part_TM, tokens)
        yield
        return wait()

    def _start_reduce(self, part_TM: Tensor, tokens: Tokens) -> Callable[[], Tensor]:
        """Begin to add up over the tensor group; returns what waits for the sum."""
        if len(self._wire.groups.tensor) == 1:
            return lambda: part_TM
        under_way: list[Pending] = []
        call_whole(self._begin_sum, part_TM[: tokens.rows], under_way)

        def wait() -> Tensor:
            call_whole(self._await_sum, under_way)
            if tokens.rows < len(part_TM):
                part_TM[tokens.rows :] = part_TM[max(0, tokens.rows - 1)]
            return part_TM

        return wait

    def _begin_sum(self, part_TM: Tensor, under_way: list[Pending]) -> None:
        under_way.append(self._wire.start_all_reduce(part_TM, self._wire.groups.tensor))

    def _await_sum(self, under_way: list[Pending]) -> None:
        self._wire.waited(under_way.pop())


Made = TypeVar("Made")


def by_turns(works: Sequence[Generator[None, None, Made]]) -> list[Made]:
    """Do several by turns, each up to its next stop, and return what they make, in their order.

    >>> def counting(name: str, stops: int) -> Generator[None, None, str]:
    ...     for stop in range(stops):
    ...         print(name, stop)
    ...         yield
    ...     return name
    >>> by_turns([counting("a", 2), counting("b", 1)])
    a 0
    b 0
    a 1
    ['a', 'b']
    """
    made: dict[int, Made] = {}
    while len(made) < len(works):
        for place, work in enumerate(works):
            if place in made:
                continue
            try:
                next(work)
            except StopIteration as end:
                made[place] = end.value
    return [made[place] for place in range(len(works))]


class RankGraphs(CpuGraphs):
    """CPU graphs of steps that hold collectives: nothing is sent while one is recorded."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def capture(self, call: Callable[[], Tensor], pool: None) -> tuple[CpuGraph, Tensor]:
        with self._wire.muted():
            return super().capture(call, pool)
