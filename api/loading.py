"""From a model's name to a path that is ready to extend sequences."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from twinfer.reference.sampling import Sampling
from twinfer.spec.config import ModelConfig, Storage
from twinfer.spec.decoder import Decoder, Path
from twinfer.spec.errors import MachineError, RequestError
from twinfer.spec.naming import dtype_name
from twinfer.spec.paper_models import PAPER_MODELS, reduced
from twinfer.spec.weights import WeightSource

from .chat import DATE, encode, prompt_ids
from .embedding import chosen, embed, text_ids
from .generation import GREEDY, Generation, generate
from .paths import BUILDERS, Compute, Order, Report
from .ranks import build
from .store_source import StoreSource

if TYPE_CHECKING:
    from twinfer.checkpoint import Checkpoint
    from twinfer.parallel.member import Member

Choice = TypeVar("Choice", bound=StrEnum)


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

    def tokenize(self, prompt: str, *, chat: bool = False, date: str = DATE) -> list[int]:
        """The prompt's token ids; with `chat`, those of a conversation that opens with it, held on that date.

        Raises `RequestError` where the model has no tokenizer, or no chat template.
        """
        return encode(self.checkpoint, prompt, chat=chat, date=date)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        chat: bool = False,
        date: str = DATE,
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
        sampling: Sampling = GREEDY,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
    ) -> Generation:
        """Extend each prompt, text or token ids, until an end token of the model, a stop string, or `max_new_tokens`.

        With `chat`, a prompt of text opens a conversation, held on `date`, as the model's template writes it.
        `sampling` chooses the tokens, by default the likeliest; what a prompt yields depends on the prompt, its index
        (or what `numbers` has for it) and the `seed` only. Iterate over the result for events as they come, or call
        its `outputs()`.

        Raises `RequestError` as `tokenize` and `twinfer.generate` do, before anything is allocated.
        """
        ids = prompt_ids(self.checkpoint, prompts, chat=chat, date=date)
        return generate(
            self.decoder,
            ids,
            max_new_tokens=max_new_tokens,
            end_tokens=self.checkpoint.end_tokens,
            stop=stop,
            sampling=sampling,
            seed=seed,
            tokenizer=self.checkpoint.tokenizer,
            numbers=numbers,
        )

    def embed(
        self, texts: Sequence[str | Sequence[int]], *, pooling: str | None = None, normalize: bool | None = None
    ) -> Tensor:
        """One vector for each text (or its token ids), [N, M], in float32 (float64 where compute is) on the device.

        `pooling` is mean, of all tokens' hidden vectors, or cls, the first one; with `normalize` vectors are scaled to
        length 1. What is not given is as the model's folder says (modules.json), else the mean, not scaled.

        Raises `RequestError` where the folder says what is not computed here, and for a text of more tokens than the
        model is made for: nothing is cut off. (Token ids may be as many as its context.)
        """
        how = chosen(self.checkpoint.embedding, pooling, normalize)
        return embed(self.decoder, text_ids(self.checkpoint, texts), *how)


def load(
    model: "str | Checkpoint | WeightSource",
    path: str = "compiled",
    storage: str | torch.dtype | None = None,
    compute: str | torch.dtype = "float32",
    device: str = "cpu",
    *,
    context: int | None = None,
    batches: bool = True,
    memory_budget: int | None = None,
    dram_budget: int = 0,
    report: Report | None = None,
    member: "Member | None" = None,
    routes: bool = False,
) -> Model:
    """Make a model ready to run on a path.

    `model` is a folder, a .gguf file, a built-in name such as smollm2, a checkpoint that is already open, or a source
    of weights such as `from_transformers` gives, which has no tokenizer; `path` is compiled or reference; `storage`
    how weights are kept (float32, bfloat16, int8, int4; by default as the model was converted, else float32); `compute`
    the arithmetic (float32, float64, bfloat16, float16); both may be given as torch dtypes too. `context` is the most
    tokens of a sequence, where a model named here is to hold fewer than it can. The compiled path compiles here, once
    for any prompt and batch size; without `batches`, what only several prompts at once need is compiled when they come.
    `report` is called with a line about whatever takes long. A store (made by twinfer offload build) runs on the path
    offload, whatever is named, within `memory_budget` bytes besides the interpreter; beyond these up to `dram_budget`
    bytes of it stay in DRAM and are copied instead of read. With `member` (`twinfer.ranks`) this process is one rank
    of a job, all of which call this. With `routes`, a path that can reports which experts it chose
    (`twinfer.spec.decoder.Routed`): the reference always does, the compiled path then compiles other programs.

    Raises a `TwinferError` that says what would be right: for a value that is none of these, a model that cannot be
    used, or a machine that lacks what the path needs.
    """
    chosen_path = _choose(Path, path, "path")
    given_storage = None if storage is None else _choose(Storage, dtype_name(storage), "storage")
    chosen_compute = _choose(Compute, dtype_name(compute), "compute")
    chosen_device = find_device(device)
    start = time.perf_counter()
    checkpoint = _opened(model, context, report)
    chosen_storage = given_storage or checkpoint.storage or Storage.FLOAT32
    if isinstance(checkpoint.source, StoreSource):
        chosen_path = Path.OFFLOAD
    elif memory_budget is not None or dram_budget:
        raise RequestError(
            f"{checkpoint.name} is no store, so no memory budget bounds it; make one: twinfer offload build MODEL STORE"
        )
    order = Order(
        source=checkpoint.source,
        storage=chosen_storage,
        compute=chosen_compute,
        device=chosen_device,
        batches=batches,
        report=report,
        memory_budget=memory_budget,
        routes=routes,
        dram_budget=dram_budget,
    )
    built = BUILDERS[chosen_path](order) if member is None else build(order, member)
    return Model(
        decoder=built.decoder,
        checkpoint=checkpoint,
        path=chosen_path,
        storage=chosen_storage,
        compute=chosen_compute,
        load_s=time.perf_counter() - start - built.compile_s,
        compile_s=built.compile_s,
    )


# The packages below are imported where they are needed: importing twinfer must bring no compiler and no file formats.


def _opened(model: "str | Checkpoint | WeightSource", context: int | None, report: Report | None) -> "Checkpoint":
    from twinfer.checkpoint import Checkpoint

    if isinstance(model, str):
        return open_checkpoint(model, report, context=context)
    if context is not None:
        raise RequestError("context is given for a model that is open already; give it where the model is opened")
    if isinstance(model, Checkpoint):
        return model
    nothing: dict[str, Any] = {"tokenizer": None, "end_tokens": (), "chat_template": None, "special_tokens": {}}
    return Checkpoint(name=model.config.family, source=model, config=model.config, **nothing)


def open_checkpoint(model: str, report: Report | None = None, *, context: int | None = None) -> "Checkpoint":
    """Open a folder, a .gguf file, or a built-in name; raises `TwinferError` where that fails."""
    from twinfer.checkpoint import open_model

    if any((FilePath(model) / name).is_file() for name in ("store.json", "shares.json")):
        from .stores import open_store_model

        return open_store_model(FilePath(model), context)
    if model in PAPER_MODELS:
        raise RequestError(
            f"{model} is known by its config only: there are no weights of it; see `twinfer inspect {model}`, or give "
            f"{model}/64, the same with random weights and the hidden size divided by 64"
        )
    if (config := reduced(model)) is not None:
        return _random_checkpoint(model, config, context)
    return open_model(model, context=context, report=report)


def _random_checkpoint(model: str, config: ModelConfig, context: int | None) -> "Checkpoint":
    """Return a model of the paper, its sizes reduced and its weights drawn."""
    from twinfer.checkpoint import Checkpoint
    from twinfer.checkpoint.source import limited
    from twinfer.oracle.models import RandomSource

    source = RandomSource(limited(config, context))
    about: dict[str, Any] = {"tokenizer": None, "end_tokens": (), "chat_template": None, "special_tokens": {}}
    return Checkpoint(
        name=model, source=source, config=source.config, no_tokenizer="its weights are random numbers", **about
    )


def from_transformers(module: Any, *, context: int | None = None) -> WeightSource:
    """The weights of a live transformers model of a family known here, sharing its storage where layouts allow.

        model = twinfer.load(twinfer.from_transformers(module), path="compiled")

    `context` limits the tokens of a sequence. Raises a `TwinferError` for a module that is not understood.
    """
    from twinfer.checkpoint import from_transformers

    return from_transformers(module, context=context)


def _choose(kind: type[Choice], value: str, what: str) -> Choice:
    try:
        return kind(value)
    except ValueError:
        raise RequestError(f"{what} is {value!r}; it must be one of {', '.join(kind)}") from None


def find_device(name: str) -> torch.device:
    """Return the device of that name; raises a `TwinferError` where this machine has none."""
    present = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RequestError(f"device is {name!r}; on this machine it must be one of {', '.join(present)}") from None
    if str(device) not in present and not (name == "cuda" and len(present) > 1):
        raise MachineError(f"device is {name!r}; on this machine it must be one of {', '.join(present)}")
    return device
