"""Hugging Face folders as models: config.json, safetensors, and what surrounds them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..spec.errors import CheckpointError
from .families import FAMILIES
from .family import weights_of
from .fields import Fields, short
from .safetensors_folder import SafetensorsFolder
from .source import FileSource
from .tokenizer import Tokenizer, read_tokenizer


def source(folder: Path, most_tokens: int | None = None) -> FileSource:
    """The weights of a folder. Raises `CheckpointError`, `ConfigError` or `WeightError` for what cannot be used."""
    config = _fields(folder / "config.json", most_tokens)
    if config is None:
        raise CheckpointError(f"{folder} holds no config.json; give the folder that holds it and model.safetensors")
    return weights_of(FAMILIES, config, SafetensorsFolder(folder))


def tokenizer(folder: Path) -> Tokenizer | None:
    """The folder's tokenizer.json; None where there is none. Raises `CheckpointError` where it is malformed."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    return read_tokenizer(path, "fetch the file again")


def end_tokens(folder: Path, vocabulary: int, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The tokens that end a text: as generation_config.json says, or else config.json, or else the tokenizer."""
    for name in ("generation_config.json", "config.json"):
        fields = _fields(folder / name)
        if fields is not None and (found := fields.integers("eos_token_id", least=-1)):
            return _within(found, vocabulary)
    end = special_tokens(folder).get("eos_token")
    token = tokenizer.id_of(end) if tokenizer is not None and end is not None else None
    return () if token is None else _within([token], vocabulary)


def special_tokens(folder: Path) -> dict[str, str]:
    """tokenizer_config.json's named tokens: "bos_token" and so on."""
    values = _tokenizer_config(folder)
    return dict(_named_tokens(values))


def chat_template(folder: Path) -> str | None:
    """chat_template.jinja, or the default template of tokenizer_config.json; None where there is neither."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is not UTF-8 text ({error}); fetch the file again") from None
    template = _tokenizer_config(folder).get("chat_template")
    if isinstance(template, list):  # several, by name
        template = _named_templates(template, folder).get("default")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{folder / 'tokenizer_config.json'}: chat_template is no text; it must be a template")
    return template


def _named_templates(entries: list[Any], folder: Path) -> dict[str, str]:
    named = {}
    for index, entry in enumerate(entries):
        where = f"{folder / 'tokenizer_config.json'}: chat_template[{index}]"
        if not isinstance(entry, dict):
            raise CheckpointError(f"{where} is {short(entry)}; it must be an object with name and template")
        fields = Fields(entry, f"{where}.")
        name = fields.text("name")
        named[name] = fields.text("template")
    return named


def _named_tokens(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            yield name, text


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    fields = _fields(folder / "tokenizer_config.json")
    return {} if fields is None else dict(fields.values)


def _within(tokens: list[int], vocabulary: int) -> tuple[int, ...]:
    """Those that the model can produce.

    Library defaults name tokens that a small vocabulary does not have, and -1 is what some write for none.
    """
    return tuple(dict.fromkeys(token for token in tokens if 0 <= token < vocabulary))


def _fields(path: Path, most_tokens: int | None = None) -> Fields | None:
    return Fields.of_json(path.read_bytes(), str(path), most_tokens=most_tokens) if path.is_file() else None
