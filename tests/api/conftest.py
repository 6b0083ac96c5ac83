"""A tiny model that speaks bytes, and a way to hold a decoder to account."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

import twinfer.checkpoint
from twinfer.checkpoint import Checkpoint, Tokenizer
from twinfer.oracle.models import RandomSource
from twinfer.spec.config import (
    Activation,
    AttentionConfig,
    Head,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    NormKind,
)

END, TURN = 256, 257
TEMPLATE = """\
{% for message in messages %}
<turn>{{ message['role'] }}:{{ message['content'] }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}<turn>{% endif %}"""


def byte_tokenizer() -> Tokenizer:
    """One token a byte, then `<end>` and `<turn>`; not a word of merging."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<end>", "<turn>"])
    return Tokenizer(inner)


def tiny_config(context: int = 40) -> ModelConfig:
    norm = NormConfig(kind=NormKind.RMS, epsilon=1e-5)
    layer = LayerConfig(
        norm=norm,
        attention=AttentionConfig(heads=2, kv_heads=1, head_size=4, scale=0.5),
        mlp=MlpConfig(width=16, activation=Activation.SILU, gated=True),
    )
    return ModelConfig(
        family="random",
        hidden=8,
        vocabulary=258,
        context=context,
        layers=(layer, layer),
        final_norm=norm,
        learned_positions=True,
        head=Head.UNTIED,
    )


@pytest.fixture(scope="session")
def tiny() -> Checkpoint:
    config = tiny_config()
    return Checkpoint(
        name="tiny",
        source=RandomSource(config),
        config=config,
        tokenizer=byte_tokenizer(),
        end_tokens=(END,),
        chat_template=TEMPLATE,
        special_tokens={"eos_token": "<end>"},
    )


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch) -> Callable[[Checkpoint], None]:
    """Makes every model argument open this checkpoint."""

    def use(checkpoint: Checkpoint) -> None:
        monkeypatch.setattr(twinfer.checkpoint, "open_model", lambda model, *, context=None, report=None: checkpoint)

    return use


class Witness:
    """A decoder that does as another does, and notes what it was given."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.config, self.device, self.max_batch = inner.config, inner.device, 3
        self.opened = self.closed = 0
        self.given: list[list[list[int]]] = []

    def open(self, batch: int, reserve: int) -> Any:
        self.opened += 1
        sequences, close = self.inner.open(batch, reserve), self._close
        inner_close = sequences.close
        sequences.close = lambda: (close(), inner_close())
        return sequences

    def extend(self, sequences: Any, new_tokens: Sequence[Tensor], *, every_position: bool = False) -> Any:
        self.given.append([tokens.tolist() for tokens in new_tokens])
        return self.inner.extend(sequences, new_tokens, every_position=every_position)

    def _close(self) -> None:
        self.closed += 1


@pytest.fixture
def witness(tiny: Checkpoint) -> Witness:
    from twinfer.reference.path import ReferencePath

    return Witness(ReferencePath(tiny.source, compute=torch.float64))
