"""A subprocess that renders chat templates: `python rendering.py`, a request as JSON in, a reply as JSON out.

Templates come with the model, so they are strangers' programs: jinja2's immutable sandbox lets them read the messages
and build text, and nothing else, but not in how much time and memory. So they are rendered in a subprocess that the
system bounds, and that imports nothing but jinja2: it starts in about a tenth of a second.
"""

import json
import sys
from datetime import datetime
from typing import Any, NoReturn

MOST_MEMORY = 1 << 29
"""Bytes of address space that rendering may take, the interpreter's own included, where the system can limit it."""
MOST_CHARACTERS = 10_000_000
"""Characters that a rendered conversation may hold."""


class Refused(Exception):
    """A template that calls `raise_exception`."""


def reply(request: dict[str, Any]) -> dict[str, Any]:
    """Render each conversation of a request; returns {"texts"}, {"refused"} or {"failed"}, the latter with a message.

    The template sees what it would see elsewhere: `messages`, `add_generation_prompt`, `tools` and `documents`, which
    are none, the special tokens by name (`bos_token` ...), `raise_exception`, `strftime_now`, and a `tojson` that
    leaves HTML alone.
    """
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(Extension):
        """`{% generation %}`: marks what the assistant says, for training; rendered as if the marks were not there."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

        def _said(self, caller: Any) -> Any:
            return caller()

    extensions = [loopcontrols, GenerationBlock]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = datetime.fromisoformat(request["date"]).strftime
    about = {"add_generation_prompt": True, "tools": None, "documents": None}
    texts = []
    try:
        template = environment.from_string(request["template"])
        for messages in request["conversations"]:
            texts.append(template.render(**request["special_tokens"] | about, messages=messages))
            if len(texts[-1]) > MOST_CHARACTERS:
                raise MemoryError(f"it writes {len(texts[-1])} characters; it may write {MOST_CHARACTERS}")
    except Refused as error:
        return {"refused": str(error)}
    except Exception as error:  # a stranger's program may raise anything
        return {"failed": f"{type(error).__name__}: {error}"}
    return {"texts": texts}


def _refuse(message: object) -> NoReturn:
    raise Refused(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _limit(seconds: int) -> None:
    """Bound this process's memory, and its time should nobody be left to end it, where the system can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for what, most in ((resource.RLIMIT_AS, MOST_MEMORY), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_CORE, 0)):
        try:
            resource.setrlimit(what, (most, most))
        except (ValueError, OSError):  # macOS has no limit of address space
            continue


def main() -> None:
    """Answer one request from standard input on standard output."""
    request = json.load(sys.stdin)
    sys.path[:] = request["path"]
    _limit(request["seconds"])
    json.dump(reply(request), sys.stdout)


if __name__ == "__main__":
    main()
