"""From a model's name to a path that is ready to extend sequences."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from twinfer.spec.config import ModelConfig, Storage
from twinfer.spec.decoder import Decoder, Path
from twinfer.spec.errors import MachineError, RequestError
from twinfer.spec.paper_models import PAPER_MODELS

from .chat import render_chat
from .generation import Generation, generate

if TYPE_CHECKING:
    from twinfer.checkpoint import Checkpoint, Tokenizer

Choice = TypeVar("Choice", bound=StrEnum)


class Compute(StrEnum):
    """The arithmetic, apart from how weights are kept."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.value)
        assert isinstance(dtype, torch.dtype)
        return dtype


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Model:
    """A loaded model: a path, and what it takes to speak to it in text."""

    decoder: Decoder
    checkpoint: "Checkpoint"
    path: Path
    storage: Storage
    compute: Compute
    load_s: float
    """Seconds to open the files and prepare the weights."""
    compile_s: float
    """Seconds to trace and compile; 0 on a path that is not compiled."""

    @property
    def config(self) -> ModelConfig:
        return self.decoder.config

    def encode(self, prompt: str) -> list[int]:
        """The prompt's token ids; raises `RequestError` where the model has no tokenizer."""
        return self._tokenizer().encode(prompt)

    def encode_chat(self, prompt: str) -> list[int]:
        """The ids of a conversation in which the user says `prompt` and the model is to answer."""
        template = self.checkpoint.chat_template
        if template is None:
            raise RequestError(f"{self.checkpoint.name} has no chat template; use it without chat")
        text = render_chat(template, [{"role": "user", "content": prompt}], self.checkpoint.special_tokens)
        return self._tokenizer().encode(text, special=False)

    def generate(self, prompts: Sequence[str | Sequence[int]], *, chat: bool = False, **how: Any) -> Generation:
        """`twinfer.generate` for prompts given as text (or ids), with this model's tokenizer and end tokens."""
        encode = self.encode_chat if chat else self.encode
        ids = [encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        end_tokens, tokenizer = self.checkpoint.end_tokens, self.checkpoint.tokenizer
        return generate(self.decoder, ids, end_tokens=end_tokens, tokenizer=tokenizer, **how)

    def _tokenizer(self) -> "Tokenizer":
        tokenizer = self.checkpoint.tokenizer
        if tokenizer is None:
            raise RequestError(f"{self.checkpoint.name} has no tokenizer; give prompts as token ids")
        return tokenizer


def load(
    model: str,
    path: str = "compiled",
    storage: str = "float32",
    compute: str = "float32",
    device: str = "cpu",
    *,
    report: Callable[[str], None] | None = None,
) -> Model:
    """Open a model (a folder, a .gguf file, or a built-in name such as smollm2) on a path, ready to run.

    `path` is compiled or reference; `storage` how weights are kept (float32, bfloat16, int8); `compute` the
    arithmetic. The compiled path compiles here, once for any prompt and batch size. `report` is told what takes long.

    Raises `RequestError`, `CheckpointError`, `WeightError`, `ConfigError` or `MachineError`, all `TwinferError`s.
    """
    chosen_path = _choose(Path, path, "path")
    chosen_storage = _choose(Storage, storage, "storage")
    chosen_compute = _choose(Compute, compute, "compute")
    chosen_device = _device(device)
    if model in PAPER_MODELS:
        raise RequestError(
            f"{model} is known by its config alone: there are no weights of it; see `twinfer inspect {model}`"
        )
    from twinfer.checkpoint import open_model  # here, so that importing twinfer stays light

    start = time.perf_counter()
    checkpoint = open_model(model, report=report)
    compile_s = 0.0
    decoder: Decoder
    if chosen_path is Path.REFERENCE:
        from twinfer.reference.path import ReferencePath

        decoder = ReferencePath(
            checkpoint.source, storage=chosen_storage, compute=chosen_compute.dtype, device=chosen_device
        )
        load_s = time.perf_counter() - start
    else:
        from twinfer.compiled.path import CompiledPath

        decoder = compiled = CompiledPath(
            checkpoint.source, storage=chosen_storage, compute=chosen_compute.dtype, device=chosen_device, report=report
        )
        load_s = time.perf_counter() - start
        compile_s = compiled.compile()
    return Model(
        decoder=decoder,
        checkpoint=checkpoint,
        path=chosen_path,
        storage=chosen_storage,
        compute=chosen_compute,
        load_s=load_s,
        compile_s=compile_s,
    )


def _choose(kind: type[Choice], value: str, what: str) -> Choice:
    try:
        return kind(value)
    except ValueError:
        raise RequestError(f"{what} is {value!r}; it must be one of {', '.join(kind)}") from None


def _device(name: str) -> torch.device:
    present = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RequestError(f"device is {name!r}; on this machine it must be one of {', '.join(present)}") from None
    if str(device) not in present and not (name == "cuda" and len(present) > 1):
        raise MachineError(f"device is {name!r}; on this machine it must be one of {', '.join(present)}")
    return device
