"""Prompts as token ids: plain text, or a conversation written as the chat model was trained to read it."""

import json
import reprlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from operator import index as as_integer
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinfer.spec.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from twinfer.checkpoint import Checkpoint


RENDERER = Path(__file__).with_name("rendering.py")
MOST_SECONDS = 10
"""Time that rendering one conversation may take; of many at once, each may take a tenth of a second more."""
DATE = "2025-01-01"
"""The date that chat templates see, unless another is asked for: today's would change the text from day to day."""


def encode(checkpoint: "Checkpoint", prompt: str, *, chat: bool = False, date: str = DATE) -> list[int]:
    """The prompt's token ids; with `chat`, those of a conversation in which the user says it and an answer is due.

    Raises `RequestError` where the model has no tokenizer, or no chat template.
    """
    return prompt_ids(checkpoint, [prompt], chat=chat, date=date)[0]


def prompt_ids(
    checkpoint: "Checkpoint", prompts: Sequence[str | Sequence[int]], *, chat: bool = False, date: str = DATE
) -> list[list[int]]:
    """Each prompt's token ids, text encoded as `encode` does it. What is ids already stays as it is."""
    check_several("prompts", prompts)
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    encoded = iter(_encoded(checkpoint, texts, chat=chat, date=date) if texts else [])
    return [
        next(encoded) if isinstance(prompt, str) else as_ids(f"prompt {index}", prompt)
        for index, prompt in enumerate(prompts)
    ]


def _encoded(checkpoint: "Checkpoint", texts: Sequence[str], *, chat: bool, date: str) -> list[list[int]]:
    tokenizer = checkpoint.needed_tokenizer()
    if not chat:
        return [tokenizer.encode(text) for text in texts]
    if checkpoint.chat_template is None:
        raise RequestError(f"{checkpoint.name} has no chat template; use it without chat")
    conversations = [[{"role": "user", "content": text}] for text in texts]
    rendered = render_chats(checkpoint.chat_template, conversations, checkpoint.special_tokens, date)
    return [tokenizer.encode(text, special=False) for text in rendered]  # the template has written the special tokens


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


def render_chats(
    template: str,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    special_tokens: Mapping[str, str],
    date: str = DATE,
) -> list[str]:
    """Render conversations (messages {"role": ..., "content": ...}), up to where the model's answer begins.

    Raises `CheckpointError` where the template is broken or takes more time or memory than it may, `RequestError`
    where it refuses the messages.
    """
    seconds = MOST_SECONDS + len(conversations) // 10
    request = {
        "template": template,
        "conversations": conversations,
        "special_tokens": dict(special_tokens),
        "date": _checked_date(date),
        "path": sys.path,
        "seconds": 2 * seconds,
    }
    reply = _rendered(json.dumps(request), seconds)
    if "refused" in reply:
        raise RequestError(f"the model's chat template refuses these messages: {reply['refused']}")
    if "failed" in reply:
        raise CheckpointError(f"the model's chat template fails: {reply['failed']}; use the prompt without chat")
    texts: list[str] = reply["texts"]
    return texts


def _rendered(request: str, seconds: float) -> dict[str, Any]:
    """Have a subprocess render the request."""
    command = [sys.executable, "-I", str(RENDERER)]
    try:
        done = subprocess.run(command, input=request.encode(), capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"it takes more than {seconds} s"}
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").splitlines()
        return {"failed": f"its subprocess ended with status {done.returncode} ({lines[-1] if lines else 'no word'})"}
    reply: dict[str, Any] = json.loads(done.stdout)
    return reply


def _checked_date(date: str) -> str:
    try:
        return datetime.strptime(date, "%Y-%m-%d").date().isoformat()
    except (TypeError, ValueError):
        raise RequestError(f"date is {date!r}; it must be a day such as {DATE}") from None
