"""Prompts as token ids: plain text, or a conversation written as the chat model was trained to read it.

Templates come with the model, so they are strangers' programs: jinja2's immutable sandbox lets them read the messages
and build text, and nothing else.
"""

import json
import reprlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from operator import index as as_integer
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from twinfer.spec.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from twinfer.checkpoint import Checkpoint


def encode(checkpoint: "Checkpoint", prompt: str, *, chat: bool = False) -> list[int]:
    """The prompt's token ids; with `chat`, those of a conversation in which the user says it and an answer is due.

    Raises `RequestError` where the model has no tokenizer, or no chat template.
    """
    tokenizer = checkpoint.needed_tokenizer()
    if not chat:
        return tokenizer.encode(prompt)
    if checkpoint.chat_template is None:
        raise RequestError(f"{checkpoint.name} has no chat template; use it without chat")
    messages = [{"role": "user", "content": prompt}]
    text = render_chat(checkpoint.chat_template, messages, checkpoint.special_tokens)
    return tokenizer.encode(text, special=False)  # the template has written the special tokens


def prompt_ids(
    checkpoint: "Checkpoint", prompts: Sequence[str | Sequence[int]], *, chat: bool = False
) -> list[list[int]]:
    """Each prompt's token ids, text encoded as `encode` does it. What is ids already stays as it is."""
    check_several("prompts", prompts)
    return [
        encode(checkpoint, prompt, chat=chat) if isinstance(prompt, str) else as_ids(f"prompt {index}", prompt)
        for index, prompt in enumerate(prompts)
    ]


def check_several(what: str, given: object) -> None:
    """Raise `RequestError` for one text where a sequence of them is asked for: it would be taken letter by letter."""
    if isinstance(given, str | bytes | bytearray):
        each = what.removesuffix("s")
        raise RequestError(f"{what} is the string {given[:40]!r}; it must be a sequence of {what}, such as [{each}]")


def as_ids(what: str, ids: Sequence[int]) -> list[int]:
    """The token ids as plain integers. Raises `RequestError` for anything that is no sequence of integers."""
    if not isinstance(ids, bytes | bytearray):
        with suppress(TypeError):
            return [as_integer(token) for token in ids]
    raise RequestError(f"{what} is {reprlib.repr(ids)}; it must be token ids, a sequence of integers")


def render_chat(template: str, messages: Sequence[Mapping[str, str]], special_tokens: Mapping[str, str]) -> str:
    """Render messages ({"role": ..., "content": ...}), up to where the model's answer begins.

    The template sees what it would see elsewhere: `messages`, `add_generation_prompt`, the special tokens by name
    (`bos_token` ...), `raise_exception`, and a `tojson` that leaves HTML alone. Dates (`strftime_now`) are left
    undefined, so that the same conversation gives the same text tomorrow.

    Raises `CheckpointError` where the template is broken, `RequestError` where it refuses the messages.
    """
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **special_tokens)
    except RequestError:
        raise
    except Exception as error:  # a stranger's program may raise anything
        raise CheckpointError(
            f"the model's chat template fails: {type(error).__name__}: {error}; use the prompt without chat"
        ) from error


def _refuse(message: str) -> NoReturn:
    raise RequestError(f"the model's chat template refuses these messages: {message}")


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
