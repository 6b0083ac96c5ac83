"""Open a model, whatever it is kept in: a Hugging Face folder, the twinfer form, a GGUF file, or a built-in name."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..spec.config import ModelConfig, Storage
from ..spec.errors import CheckpointError, RequestError
from ..spec.weights import WeightSource
from . import config_json, huggingface
from .builtin import BUILT_IN, INCLUDED, cache_folder
from .embedding_recipe import EmbeddingRecipe, gguf_recipe, recipe_of
from .fetch import fetched
from .fields import Fields
from .gguf import model as gguf_model
from .gguf import tokenizer as gguf_tokenizer
from .gguf.file import GgufFile
from .native.folder import DESCRIPTION, TwinferFolder
from .tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model as found on disk: everything checked, no weight read yet."""

    name: str
    source: WeightSource
    config: ModelConfig
    tokenizer: Tokenizer | None
    """None where the model comes without, or with one that cannot be used; it then takes and gives token ids alone."""
    end_tokens: tuple[int, ...]
    """Any of these ends a text."""
    chat_template: str | None
    """A Jinja template. It comes with the model: render it in a sandbox."""
    special_tokens: dict[str, str]
    """What the template may call by name: `bos_token`, `eos_token` and so on."""
    storage: Storage | None = None
    """As what its matrices are kept, in the twinfer form; None where they are as its makers left them."""
    embedding: EmbeddingRecipe = field(default_factory=EmbeddingRecipe)
    """How one vector is made of a text."""
    no_tokenizer: str = "it comes without"
    """Why there is none, where there is none."""

    def needed_tokenizer(self) -> Tokenizer:
        """The tokenizer, to a caller who has text. Raises `RequestError` where there is none."""
        if self.tokenizer is None:
            raise RequestError(f"{self.name} has no tokenizer ({self.no_tokenizer}); give token ids instead of text")
        return self.tokenizer


def open_model(model: str, *, context: int | None = None, report: Callable[[str], None] | None = None) -> Checkpoint:
    """Open the model that `model` names: a folder, a .gguf file, or one of `INCLUDED` or `BUILT_IN`.

    `context` is how many tokens a sequence will hold at most, where that is fewer than the model was made for; models
    whose positions are scaled otherwise for long texts than for short ones (LongRoPE) go by it. `report` is told, in a
    line each, what takes long and what should be known. Raises `CheckpointError`, `ConfigError` or `WeightError` for a
    model that cannot be used.
    """
    try:
        checkpoint = _open(model, context, report or _quiet)
        for note in getattr(checkpoint.source, "notes", ()):
            (report or _quiet)(f"{checkpoint.name}: {note}")
        return checkpoint
    except OSError as error:
        raise CheckpointError(f"{model} cannot be read: {error.strerror or error}; check its permissions") from None


def _open(model: str, context: int | None, report: Callable[[str], None]) -> Checkpoint:
    if model in INCLUDED:  # a folder of that name can still be given as ./name
        path, name = INCLUDED[model], model
    elif model in BUILT_IN:
        path, name = fetched(BUILT_IN[model], cache_folder(), report), model
    else:
        try:
            path = Path(model).expanduser()
        except RuntimeError as error:  # ~name where there is no such user, ~ where nobody has a home
            raise CheckpointError(f"the path {model!r} cannot be followed: {error} Give it without ~") from None
        name = path.resolve().name if path.is_dir() else path.stem
    if path.is_dir():
        return _open_twinfer(path, context) if (path / DESCRIPTION).is_file() else _open_folder(path, name, context)
    if path.is_file():
        return _open_gguf(path, name, context)
    raise CheckpointError(
        f"there is no model {model!r}: neither a file or folder here nor a built-in name "
        f"({', '.join((*BUILT_IN, *INCLUDED))}); give one of those names, a .gguf file, a Hugging Face folder "
        "(config.json and model.safetensors), or one that twinfer convert has made"
    )


def _open_twinfer(folder: Path, context: int | None) -> Checkpoint:
    source = TwinferFolder(folder, context)
    checkpoint = described_checkpoint(source.about, source, source.tokenizer(), source.storage, str(folder))
    source.about.finish()
    return checkpoint


def described_checkpoint(
    about: Fields, source: WeightSource, tokenizer: Tokenizer | None, storage: Storage, where: str
) -> Checkpoint:
    """Return a model of which these fields say what there is to know besides (`native.convert.about_model`)."""
    special, embedding = about.section("special_tokens"), about.section("embedding")
    end_tokens = tuple(about.integers("end_tokens"))
    if any(token >= source.config.vocabulary for token in end_tokens):
        raise about.wrong("end_tokens", f"a list of token ids below the vocabulary's size, {source.config.vocabulary}")
    return Checkpoint(
        name=about.text("name"),
        source=source,
        config=source.config,
        tokenizer=tokenizer,
        end_tokens=end_tokens,
        chat_template=about.optional_text("chat_template"),
        special_tokens={} if special is None else {name: special.text(name) for name in special.names()},
        storage=storage,
        embedding=config_json.read(EmbeddingRecipe, embedding.values if embedding else {}, f"{where}: embedding"),
        no_tokenizer=about.text("no_tokenizer"),
    )


def _open_folder(folder: Path, name: str, context: int | None) -> Checkpoint:
    source = huggingface.source(folder, context)
    tokenizer = huggingface.tokenizer(folder)
    return Checkpoint(
        name=name,
        source=source,
        config=source.config,
        tokenizer=tokenizer,
        end_tokens=huggingface.end_tokens(folder, source.config.vocabulary, tokenizer),
        chat_template=huggingface.chat_template(folder),
        special_tokens=huggingface.special_tokens(folder),
        embedding=recipe_of(folder, source.config),
    )


def _open_gguf(path: Path, name: str, context: int | None) -> Checkpoint:
    file = GgufFile(path)
    metadata = file.take_metadata()
    source = gguf_model.source(file, metadata, context)
    fields = Fields(metadata, f"{path}: ")
    about: dict[str, Any] = {}
    try:
        about["tokenizer"] = gguf_tokenizer.rebuilt(fields)
    except gguf_tokenizer.UnknownKind as error:
        about |= {"tokenizer": None, "no_tokenizer": str(error)}
    return Checkpoint(
        name=name,
        source=source,
        config=source.config,
        **about,
        end_tokens=gguf_tokenizer.end_tokens(fields, source.config.vocabulary),
        chat_template=fields.text("tokenizer.chat_template") if fields.has("tokenizer.chat_template") else None,
        special_tokens=gguf_tokenizer.special_tokens(fields),
        embedding=gguf_recipe(fields),
    )


def _quiet(line: str) -> None:
    """Report to nobody."""
