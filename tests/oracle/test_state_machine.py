"""Any sequence of open, extend, close and cache growth: the compiled path, its graphs run eagerly, is the reference."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from twinfer.compiled.path import CompiledPath
from twinfer.oracle.baseline import Baseline
from twinfer.oracle.models import RandomSource, draw_model_config
from twinfer.oracle.paths import Comparison
from twinfer.oracle.schedule import GREEDY, Close, Extend, Open
from twinfer.oracle.strategies import drawn
from twinfer.spec.config import ModelConfig, Storage

CONTEXT = 24


class TwinPaths(RuleBasedStateMachine):
    """Up to several groups of sequences live at a time, each with lengths, capacity and contents of its own."""

    groups = Bundle("groups")

    @initialize(
        config=drawn(lambda pick: draw_model_config(pick, context=CONTEXT)),
        seed=st.integers(0, 2**20),
        storage=st.sampled_from(Storage),
    )
    def load(self, config: ModelConfig, seed: int, storage: Storage) -> None:
        source = RandomSource(config, seed)
        self.config = config
        self.opened = 0
        self.comparison = Comparison(
            Baseline.of(source, storage=storage), CompiledPath(source, storage=storage, mode="eager")
        )

    @rule(
        target=groups,
        prompts=st.lists(st.lists(st.integers(0, 2**20), min_size=1, max_size=9), min_size=1, max_size=3),
        reserve=st.integers(1, CONTEXT),
        every_position=st.booleans(),
    )
    def open(self, prompts: list[list[int]], reserve: int, every_position: bool) -> str:
        """Open sequences and give each a prompt, which may be longer than what is reserved."""
        group = f"g{self.opened}"
        self.opened += 1
        self.comparison.do(Open(group, len(prompts), reserve))
        self.comparison.do(Extend(group, self.within(group, prompts), every_position))
        return group

    @rule(
        group=groups,
        pieces=st.lists(st.lists(st.integers(0, 2**20), max_size=5), min_size=3, max_size=3),
        every_position=st.booleans(),
    )
    def extend(self, group: str, pieces: list[list[int]], every_position: bool) -> None:
        """Some gain many tokens, some one, some none."""
        self.comparison.do(Extend(group, self.within(group, pieces), every_position))

    @rule(group=groups, steps=st.integers(1, 4))
    def decode(self, group: str, steps: int) -> None:
        for _ in range(steps):
            room = (length < CONTEXT for length in self.comparison.lengths(group))
            self.comparison.do(Extend(group, tuple((GREEDY,) if more else () for more in room)))

    @rule(group=consumes(groups))
    def close(self, group: str) -> None:
        self.comparison.do(Close(group))

    @invariant()
    def nothing_but_rounding_differs(self) -> None:
        if hasattr(self, "comparison"):
            assert self.comparison.result.holds, "\n".join(self.comparison.result.failures)

    def within(self, group: str, pieces: list[list[int]]) -> tuple[tuple[int, ...], ...]:
        """Pieces cut to the context, of ids in the vocabulary."""
        lengths = self.comparison.lengths(group)
        return tuple(
            tuple(token % self.config.vocabulary for token in piece[: CONTEXT - length])
            for length, piece in zip(lengths, pieces[: len(lengths)], strict=True)
        )


TwinPaths.TestCase.settings = settings(max_examples=12, stateful_step_count=10)
TestTwinPaths = TwinPaths.TestCase
