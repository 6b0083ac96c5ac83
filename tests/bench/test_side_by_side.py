"""The benchmark's arithmetic, and that its peer computes the same model."""

import pytest
import torch
from torch import Tensor

from twinfer.bench import __main__ as bench
from twinfer.bench.peers import transformers_llama
from twinfer.bench.side_by_side import PathCandidate, Speeds, TransformersCandidate, measure
from twinfer.checkpoint import open_model
from twinfer.oracle.models import RandomSource
from twinfer.reference.path import ReferencePath
from twinfer.spec.config import (
    Activation,
    AttentionConfig,
    Head,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    NormKind,
    RotaryConfig,
    RotaryLayout,
)
from twinfer.spec.errors import RequestError


def llama(*, tied: bool = False, gated: bool = True) -> ModelConfig:
    norm = NormConfig(kind=NormKind.RMS, epsilon=1e-5)
    rotary = RotaryConfig(layout=RotaryLayout.HALF_SPLIT, size=8)
    attention = AttentionConfig(heads=4, kv_heads=2, head_size=8, scale=8**-0.5, rotary=rotary)
    layer = LayerConfig(
        norm=norm, attention=attention, mlp=MlpConfig(width=40, activation=Activation.SILU, gated=gated)
    )
    return ModelConfig(
        family="llama",
        hidden=24,
        vocabulary=50,
        context=64,
        layers=(layer,) * 2,
        final_norm=norm,
        learned_positions=False,
        head=Head.TIED if tied else Head.OWN,
    )


class Fake:
    """A candidate that takes as long as it is told, and notes when it is called."""

    def __init__(self, name: str, calls: list[str], decode_s: list[float], factor: float):
        self.name, self.calls, self.decode_s, self.factor = name, calls, iter(decode_s), factor

    def prefill(self, token_T: Tensor) -> float:
        return len(token_T) * self.factor

    def decode(self, prompt_T: Tensor, steps: int) -> float:
        self.calls.append(self.name)
        return next(self.decode_s)


def test_rounds_take_turns_and_the_first_is_not_counted() -> None:
    calls: list[str] = []
    fakes = {"a": Fake("a", calls, [100, 1, 2, 9], 0.5), "b": Fake("b", calls, [100, 4, 4, 4], 0.25)}
    speeds = measure(fakes, 50, [4, 8], 3, lambda line: None)
    assert calls == ["a", "b"] * 4
    assert speeds["a"].decode_s == [1, 2, 9]
    assert speeds["a"].decode_tokens_per_s == 1 / 2  # the median round
    assert speeds["b"].prefill_tokens_per_s(8) == 4


@pytest.mark.parametrize("tied", [False, True])
def test_the_peer_computes_the_same_model(tied: bool) -> None:
    """Its choice after every prefix of a prompt is the reference's: the weights went where they belong."""
    source = RandomSource(llama(tied=tied), seed=3)
    token_T = torch.randint(50, (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        peer_TV = transformers_llama(source)(token_T[None]).logits[0]
    path = ReferencePath(source)
    (own_TV,) = path.extend(path.open(1, 40), [token_T], every_position=True)
    assert torch.equal(peer_TV.argmax(-1), own_TV.argmax(-1))


def test_both_kinds_of_candidate_can_be_timed() -> None:
    source = RandomSource(llama(), seed=3)
    for candidate in (PathCandidate(ReferencePath(source)), TransformersCandidate(transformers_llama(source))):
        assert candidate.prefill(torch.arange(9)) > 0
        assert candidate.decode(torch.arange(9), 2) > 0


def test_the_peer_is_the_model_that_is_compared_by_default() -> None:
    """Whatever the trained model's file says in other words than the peer's config."""
    source = open_model("smollm2").source
    token_T = torch.tensor([504, 3575, 282, 4649, 314])
    with torch.no_grad():
        assert int(transformers_llama(source)(token_T[None]).logits[0, -1].argmax()) == 7042


def test_models_that_the_peer_is_not_are_refused() -> None:
    with pytest.raises(RequestError, match="LLaMA-like"):
        transformers_llama(RandomSource(llama(gated=False)))


def test_the_tables_show_what_was_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {
        bench.PEER: Speeds(decode_s=[0.1], prefill_s={n: [1.0] for n in bench.LENGTHS}),
        "compiled int8": Speeds(decode_s=[0.02], prefill_s={n: [0.5] for n in bench.LENGTHS}),
    }
    monkeypatch.setenv("COLUMNS", "200")
    bench.show(
        {
            "model": "tiny",
            "rounds": 1,
            "threads": 2,
            "speed": bench.rows(speeds),
            "memory": [
                {
                    "storage": "int8",
                    "first_compile_s": 30.0,
                    "warm_compile_s": 2.0,
                    "prepared_weight_bytes": 128 * 2**20,
                    "beyond_torch_bytes": 300 * 2**20,
                    "allowed_bytes": 342 * 2**20,
                }
            ],
        }
    )
    printed = [line.strip("│ ").split() for line in capsys.readouterr().out.splitlines()]
    words = [[word for word in line if word != "│"] for line in printed]
    assert ["compiled", "int8", "50.0", "5.00", "520", "600", "1024", "2.00"] in words
    assert ["int8", "30.0", "2.0", "128", "300", "342"] in words
