"""How a model's makers turn hidden vectors into one vector a text.

In a folder modules.json says so, and the files that it leads to: those of the sentence-transformers library. A GGUF
file names the pooling alone. What they ask for and is not computed here refuses no model: its hidden vectors are right
all the same. It is kept as a sentence, for when a text's vector is asked for.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from ..spec.config import Head, ModelConfig, Pooling
from ..spec.errors import CheckpointError, ConfigError
from .fields import MOST, Fields, parsed_json

MODULES = "modules.json"

TRANSFORMER = {
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}
"""Fields of the Transformer module in newer files, each with the one value that is computed."""

GGUF_POOLING = (Pooling.MEAN, Pooling.MEAN, Pooling.CLS)
"""By GGUF's numbers, of which 0 says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingRecipe:
    """What happens before and after the model. As it stands here where nothing says otherwise."""

    pooling: Pooling | None = Pooling.MEAN
    """None where the makers' is another, as `unknown` says."""
    normalize: bool | None = False
    """Whether vectors are scaled to length 1. None where the makers do what is not computed here, as `unknown` says."""
    most_tokens: int | None = None
    """The most tokens of a text, where that is less than the model's context."""
    lower_case: bool = False
    """Whether texts are turned into lower case first."""
    unknown: str = ""
    """What the folder says and is not computed here."""

    def __post_init__(self) -> None:
        if self.most_tokens is not None and self.most_tokens < 1:
            raise ConfigError(f"EmbeddingRecipe.most_tokens is {self.most_tokens}; it must be at least 1, or None")


def recipe_of(folder: Path, config: ModelConfig) -> EmbeddingRecipe:
    """Read a folder's recipe. Raises `CheckpointError` where a file of it is missing or malformed."""
    if not (folder / MODULES).is_file():
        return _usual(config)
    most_tokens, lower_case = None, False
    try:
        most_tokens, lower_case = _texts(folder)
        recipe = _read(folder)
    except ConfigError as error:
        recipe = EmbeddingRecipe(pooling=None, normalize=None, unknown=str(error))
    return replace(recipe, most_tokens=most_tokens, lower_case=lower_case)  # they hold for any pooling


def _usual(config: ModelConfig) -> EmbeddingRecipe:
    """Where nothing says how."""
    if config.head is Head.NONE and all(layer.attention.causal for layer in config.layers):
        made = "is made of its end token's hidden vector by a projection, which is not computed here"
        return EmbeddingRecipe(pooling=None, normalize=None, unknown=f"this model's own vector of a text {made}")
    return EmbeddingRecipe()


def gguf_recipe(metadata: Fields) -> EmbeddingRecipe:
    """A GGUF file's recipe."""
    name = f"{metadata.text('general.architecture')}.pooling_type"
    kind = metadata.integer(name, 0, least=0)
    if kind >= len(GGUF_POOLING):
        wrong = metadata.wrong(name, "0 (none), 1 (mean) or 2 (cls), which is all that is computed here")
        return EmbeddingRecipe(pooling=None, unknown=str(wrong))
    return EmbeddingRecipe(pooling=GGUF_POOLING[kind])


def _read(folder: Path) -> EmbeddingRecipe:
    modules = list(_modules(folder / MODULES))
    kinds = [kind for kind, _ in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ConfigError(
            f"{folder / MODULES}: the modules are {kinds}; only Transformer, Pooling and then, or not, Normalize are "
            "computed by this version"
        )
    if modules[0][1] != folder:
        raise ConfigError(f"{folder / MODULES}: the Transformer lies in {modules[0][1]}; open that folder instead")
    _no_prompt(folder)
    _check_transformer(folder)
    modes = _modes(_fields(modules[1][1] / "config.json"))
    known = next((pooling for pooling in Pooling if modes == [pooling.value]), None)
    return EmbeddingRecipe(
        pooling=known,
        normalize="Normalize" in kinds,
        unknown="" if known else f"{modules[1][1] / 'config.json'}: the pooling is {modes}, which is not computed here",
    )


def _modules(path: Path) -> Iterator[tuple[str, Path]]:
    """Each module's class, and the folder in which its own config lies."""
    modules = parsed_json(path.read_bytes(), str(path))
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise CheckpointError(f"{path} must hold a list of modules; fetch the file again")
    for index, module in enumerate(modules):
        fields = Fields(module, f"{path}: module {index}: ")
        inside = PurePosixPath(fields.text("path", ""))
        if inside.is_absolute() or ".." in inside.parts or not str(inside).isprintable():
            raise fields.wrong("path", "a folder inside the model's")
        fields.ignore(("idx", "name"))
        kind = fields.text("type").rpartition(".")[2]
        fields.finish()
        yield kind, path.parent / inside


def _modes(config: Fields) -> list[str]:
    """The pooling modes that are on; several are set side by side, so none of them alone is meant."""
    marked = {
        "cls": config.flag("pooling_mode_cls_token", False),
        "mean": config.flag("pooling_mode_mean_tokens", "pooling_mode" not in config.values),
        "max": config.flag("pooling_mode_max_tokens", False),
        "mean_sqrt_len_tokens": config.flag("pooling_mode_mean_sqrt_len_tokens", False),
        "weightedmean": config.flag("pooling_mode_weightedmean_tokens", False),
        "lasttoken": config.flag("pooling_mode_lasttoken", False),
    }
    named = [config.text("pooling_mode")] if config.has("pooling_mode") else []
    config.ignore(("word_embedding_dimension", "embedding_dimension"))  # the width, which the model has by itself
    config.ignore(("pooling_mode", "include_prompt"))  # there is no prompt
    config.finish()
    return named + [name for name, on in marked.items() if on]


def _texts(folder: Path) -> tuple[int | None, bool]:
    """The most tokens of a text, and whether it becomes lower case.

    Where the file of the Transformer module does not say, it is the tokenizer that cuts texts.
    """
    fields = _transformer(folder)
    if fields is None:
        return _tokenizer_limit(folder), False
    lower_case = fields.flag("do_lower_case", False)
    return fields.optional_integer("max_seq_length", None) or _tokenizer_limit(folder), lower_case


def _transformer(folder: Path) -> Fields | None:
    """What the folder says of its Transformer module."""
    path = next(iter(sorted(folder.glob("sentence_*_config.json"))), None)  # bert, roberta, distilbert ...
    return None if path is None else _fields(path)


def _check_transformer(folder: Path) -> None:
    """Raise `ConfigError` where the Transformer module does more than to give every token's hidden vector."""
    fields = _transformer(folder)
    if fields is not None:
        fields.ignore(("max_seq_length", "do_lower_case"))  # read by `_texts`
        for name, computed in TRANSFORMER.items():
            fields.only(name, computed, None)
        fields.finish()


def _tokenizer_limit(folder: Path) -> int | None:
    """The tokens at which the tokenizer's own files cut a text: the fewer, where both say so."""
    limits = []
    path = folder / "tokenizer_config.json"
    if path.is_file() and (limit := _limit(_fields(path), "model_max_length")):
        limits.append(limit)
    path = folder / "tokenizer.json"
    if path.is_file() and (truncation := _fields(path).section("truncation")):
        limits.append(truncation.integer("max_length"))
    return min(limits, default=None)


def _limit(fields: Fields, name: str) -> int | None:
    """A number of tokens; None for one that no model reaches, as transformers writes for no limit: 10 ** 30."""
    value = fields.values.get(name)
    beyond = isinstance(value, int | float) and not isinstance(value, bool) and value > MOST
    return None if beyond else fields.optional_integer(name, None)


def _no_prompt(folder: Path) -> None:
    """Refuse a text that is put before every other by default."""
    path = folder / "config_sentence_transformers.json"
    if path.is_file():
        _fields(path).only("default_prompt_name", None)


def _fields(path: Path) -> Fields:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, though {MODULES} leads to it; fetch the folder again")
    return Fields.of_json(path.read_bytes(), str(path))
