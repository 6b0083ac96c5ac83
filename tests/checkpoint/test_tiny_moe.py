"""The mixture of experts that comes with the package: its size, its figures, its bytes, and the script that made it.

`ruth.txt` is the beginning of the book of Ruth (King James Version, public domain), which was held out of training.
"""

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from twinfer.checkpoint import Checkpoint, open_model
from twinfer.checkpoint.builtin import INCLUDED
from twinfer.reference.path import ReferencePath
from twinfer.spec.config import Storage
from twinfer.spec.moe import MoeConfig
from twinfer.spec.weights import tensors

ROOT = Path(__file__).parent.parent.parent
RUTH = (Path(__file__).parent / "ruth.txt").read_bytes()
WINDOW = 512
BITS_PER_BYTE = 1.5331
"""Of tiny-moe on `ruth.txt`, rounded to four digits."""
IMBALANCE = [1.12, 1.14, 1.29]
"""Tokens of the busiest expert over the mean, in each layer that has experts, rounded to two digits."""


@pytest.fixture(scope="module")
def shipped() -> Checkpoint:
    return open_model("tiny-moe")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """Return the training script, imported from the checkout."""
    spec = importlib.util.spec_from_file_location("tiny_moe", ROOT / "training" / "tiny_moe.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(checkpoint: Checkpoint) -> tuple[float, list[Tensor]]:
    """Return the bits a byte of `ruth.txt` on the reference path, and the chosen experts of each mixture."""
    path = ReferencePath(checkpoint.source, storage=Storage.BFLOAT16)
    byte_T = torch.tensor(list(RUTH))
    window_WT, target_T = byte_T[:-1].split(WINDOW), byte_T[1:]
    logit_WTV = path.extend(path.open(len(window_WT), WINDOW), window_WT, every_position=True)
    nats = torch.nn.functional.cross_entropy(torch.cat([*logit_WTV]), target_T).item()
    return nats / math.log(2), [torch.cat(layer) for layer in zip(*path.routes, strict=True)]


def test_the_weights_take_at_most_4_mb() -> None:
    """All files of the folder together, tokenizer and description included."""
    assert sum(path.stat().st_size for path in INCLUDED["tiny-moe"].iterdir()) <= 4_000_000


def test_bits_per_byte_are_as_stated_on_the_reference_path_and_by_the_script(
    shipped: Checkpoint, script: ModuleType
) -> None:
    """The figure that the script states for a text is that of the model as it ships, computed by the reference."""
    source = shipped.source
    weights = {f"embedding.{name}": tensor.float() for name, tensor in tensors(source.embedding())}
    weights |= {f"head.{name}": tensor for name, tensor in tensors(source.head())}
    for index in range(len(source.config.layers)):
        weights |= {f"{index}.{name}": tensor.float() for name, tensor in tensors(source.layer(index))}
    by_script = script.bits_per_byte(weights, script.mixture_config(), torch.tensor(list(RUTH)))
    by_reference, _ = read(shipped)
    assert abs(by_script - by_reference) < 1e-5  # float32 sums in another order; half the rotary base moves it by 0.009
    assert round(by_reference, 4) == BITS_PER_BYTE


def test_the_script_describes_the_model_that_ships(shipped: Checkpoint, script: ModuleType) -> None:
    assert shipped.config == script.mixture_config()
    assert shipped.storage is Storage.BFLOAT16
    assert shipped.end_tokens == (script.END,)


def test_every_expert_of_every_layer_serves(shipped: Checkpoint) -> None:
    """On the held-out text no expert is idle, and the busiest serves as many tokens as stated."""
    _, chosen = read(shipped)
    experts = [layer.mlp.router.experts for layer in shipped.config.layers if isinstance(layer.mlp, MoeConfig)]
    served = [
        torch.bincount(expert_TK.flatten(), minlength=count) for expert_TK, count in zip(chosen, experts, strict=True)
    ]
    assert all((served_E > 0).all() for served_E in served)
    assert [round(float(served_E.max() / served_E.float().mean()), 2) for served_E in served] == IMBALANCE


@given(content=st.binary(max_size=40))
def test_token_ids_are_bytes(content: bytes) -> None:
    """Any bytes decode as UTF-8 does, whole and as a stream; text encodes to its bytes, whatever it holds."""
    tokenizer = open_model("tiny-moe").needed_tokenizer()
    text = content.decode("utf-8", errors="replace")
    assert tokenizer.decode(list(content)) == text
    stream = tokenizer.stream()
    assert "".join([*map(stream.add, content), stream.finish()]) == text
    assert tokenizer.encode(text) == list(text.encode())


@pytest.mark.parametrize("dense", [False, True])
def test_training_again_from_a_seed_gives_equal_losses(
    script: ModuleType, dense: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it was interrupted, and went on from its checkpoint into the next cycle; another seed gives others."""
    for name, size in {"BATCH": 512, "HIDDEN": 16, "WIDTH": 16, "EXPERT_WIDTH": 16, "RESIDUAL_WIDTH": 16}.items():
        monkeypatch.setattr(script, name, size)
    config = script.dense_config() if dense else script.mixture_config()
    text = script.as_bytes(RUTH.decode())

    def losses(seed: int, stop: int, folder: Path | None) -> list[float]:
        return script.train(config, text, seed=seed, steps=2, stop=stop, folder=folder)

    whole = losses(0, 3, None)
    assert losses(0, 1, tmp_path) == whole[:1]
    assert losses(0, 3, tmp_path) == whole
    assert losses(1, 1, None) != whole[:1]


def test_the_dense_model_is_of_the_same_active_size(script: ModuleType) -> None:
    """Its parameters are those that serve one token of tiny-moe; routers and the residual's mix it does not have."""

    def count(config: object) -> int:
        return sum(weight.numel() for weight in script.drawn(config, 0).values())

    mixture, extra = script.mixture_config(), 0
    for layer in mixture.layers:
        if isinstance(layer.mlp, MoeConfig):
            idle = layer.mlp.router.experts - layer.mlp.router.top_k
            extra += idle * 3 * layer.mlp.expert.width * mixture.hidden + layer.mlp.router.experts * mixture.hidden
            extra += 2 * mixture.hidden + 2 if layer.mlp.residual else 0
    assert count(mixture) - extra == count(script.dense_config())
