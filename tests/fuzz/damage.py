"""What is done to a valid model: one damage, or a few, drawn by a number from which it can be drawn again."""

import json
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

DEEP = "a list 985 levels deep"
"""Stands for one, which `json` reads but does not write."""

VALUES: list[Any] = [
    *(10**400, -(10**400), 2**64, 2**63, 2**32 - 1, 2**31, 2**31 - 1, 2**30, 2**28, 2**16, 1000, 3, 2, 1, 0, -1),
    *(1e308, 1e39, 1e30, 1e-39, 1e-320, 1.5, 0.5, -0.5, float("nan"), float("inf")),
    *("", "\ud800", "a" * 5000, "\x1b[2J", "../x", "\0", "<", ">", "$A", "a:b", True, False, None),
    *([], {}, [{}], [None], [[]], [1, "a"], {"a": {}}, {"\ud800": 1}, DEEP, [10**400], ["\ud800"], [-1], ["a"] * 100),
]

TOO_MUCH = (LookupError, TypeError, ValueError, AttributeError, RecursionError, struct.error)
"""What a damage raises where an earlier one has left nothing that it could change."""

PIECES = ["{%", "%}", "{{", "}}", "for", "if", "messages", "[0]", "|", "tojson", "~", "*", "'", "(", ")", "\ud7ff"]
PIECES += ["{% for i in range(9) %}", "{% endfor %}", "{{ raise_exception('\x1b[2J') }}", "{{ 1 / 0 }}", "{{ x.y.z }}"]
PIECES += ["{{ messages[9] }}", "{{ ''.__class__ }}", "{{ 'a' * 9999 }}", "{% set x = x %}", "{{ none + 1 }}", "<", ">"]


def damaged(model: Path, folder: Path, random: Random) -> Path:
    """A damaged copy of the model inside the folder."""
    copy = folder / model.name
    if model.is_dir():
        shutil.copytree(model, copy)
        files = sorted(path for path in copy.rglob("*") if path.is_file())
    else:
        shutil.copy(model, copy)
        files = [copy]
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        file = random.choice(files)
        if file.exists():
            with suppress(*TOO_MUCH):
                random.choice(_ways(file))(file, random)
    return copy


def _ways(file: Path) -> list[Callable[[Path, Random], None]]:
    if file.suffix == ".json":
        return [_json] * 8 + ([_template] * 2 if file.name == "tokenizer_config.json" else []) + [_bytes, _cut]
    if file.suffix == ".safetensors":
        return [_tensors_header] * 4 + [_bytes, _cut, _weights]
    if file.suffix == ".gguf":
        return [_gguf_number] * 4 + [_gguf_text, _bytes, _cut, _weights]
    return [_bytes, _cut]


def _json(file: Path, random: Random) -> None:
    """One value of it, wherever it stands, replaced, left out, repeated or joined by another."""
    try:
        values = json.loads(file.read_bytes())
    except ValueError:  # damaged before
        return
    inside = list(_insides(values))
    if not inside:
        return
    container = random.choice(inside[: 1 + random.randrange(len(inside))])
    keys = list(container) if isinstance(container, dict) else list(range(len(container)))
    key = random.choice([*keys, "surprise"] if isinstance(container, dict) else keys) if keys else None
    match random.randrange(8):
        case 0 if key in keys:
            del container[key]
        case 1 if isinstance(container, dict) and key in keys:
            container[f"{key}_"] = container.pop(key)
        case 2 if key in keys and isinstance(container[key], int | float):
            container[key] = container[key] * random.choice([2, 3, 0.5, -1])
        case 3 if key in keys and len(keys) > 1:
            container[key] = container[random.choice(keys)]
        case _ if key is not None:
            container[key] = random.choice(VALUES)
    file.write_text(json.dumps(values).replace(json.dumps(DEEP), "[" * 985 + "]" * 985))


def _insides(values: Any) -> list[Any]:
    found = [values] if isinstance(values, dict | list) else []
    for value in values.values() if isinstance(values, dict) else values if isinstance(values, list) else []:
        found += _insides(value)
    return found


def _template(file: Path, random: Random) -> None:
    try:
        values = json.loads(file.read_bytes())
        template = values["chat_template"]
        place = random.randrange(len(template))
    except (ValueError, KeyError, TypeError):
        return
    values["chat_template"] = template[:place] + random.choice(PIECES) + template[place + random.choice([0, 0, 1, 9]) :]
    file.write_text(json.dumps(values))


def _bytes(file: Path, random: Random) -> None:
    content = bytearray(file.read_bytes())
    most = random.choice([64, 2048, len(content)])
    for _ in range(random.randint(1, 4)):
        if content:
            content[random.randrange(min(len(content), most))] = random.choice(
                [0, 1, 0x7F, 0xFF, random.randrange(256)]
            )
    file.write_bytes(content)


def _cut(file: Path, random: Random) -> None:
    content = file.read_bytes()
    size = random.randrange(len(content) + 1)
    file.write_bytes(content[:size] if random.randrange(4) else content + content[:size])


def _weights(file: Path, random: Random) -> None:
    """Words of the data that are no numbers, or huge."""
    content = bytearray(file.read_bytes())
    for _ in range(random.randint(1, 3)):
        place = len(content) // 2 // 4 * 4 + 4 * random.randrange(max(1, len(content) // 8 - 1))
        content[place : place + 4] = struct.pack("<I", random.choice([0x7FC00000, 0x7F800000, 0xFF7FFFFF, 1]))
    file.write_bytes(content)


def _tensors_header(file: Path, random: Random) -> None:
    content = file.read_bytes()
    try:
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        entry = header[random.choice([name for name in header if name != "__metadata__"])]
    except (ValueError, struct.error, IndexError):
        return
    match random.randrange(5):
        case 0:
            entry["dtype"] = random.choice(["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "X"])
        case 1:
            entry["shape"] = random.choice([[], [0], [1], [2**62, 4], [-1], entry["shape"][::-1], [2**64], "x"])
        case 2:
            entry["data_offsets"][random.randrange(2)] += random.choice([4, -4, 1, 2**32, 2**63, -(2**63)])
        case 3:
            entry["data_offsets"] = random.choice(list(header.values())).get("data_offsets", [0, 0])
        case _:
            header[random.choice(["surprise", "\u2028"])] = dict(entry)
    written = json.dumps(header).encode()
    length = len(written) if random.randrange(5) else random.choice([0, 2**63, 2**64 - 1, len(content)])
    file.write_bytes(struct.pack("<Q", length) + written + content[8 + struct.unpack("<Q", content[:8])[0] :])


def _gguf_number(file: Path, random: Random) -> None:
    """Four or eight bytes of the header."""
    content = bytearray(file.read_bytes())
    place = random.randrange(min(3000, max(1, len(content) - 8)))
    number = random.choice([0, 1, 2, 4, 5, 8, 9, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 32, 2**64 - 1, 64])
    content[place : place + 8] = struct.pack("<Q", number)[: random.choice([1, 4, 8])].ljust(8, b"\0")
    file.write_bytes(content)


def _gguf_text(file: Path, random: Random) -> None:
    """A word of the header, replaced by another as long."""
    content = file.read_bytes()
    words = [b"llama", b"attention", b"head_count", b"tokenizer", b"gpt2", b"blk.0", b"weight", b"for", b"rope"]
    word = random.choice(words)
    other = random.choice([word[::-1], b"\xff" * len(word), b"$A:b{{%}\0"[: len(word)].ljust(len(word)), word.upper()])
    file.write_bytes(content.replace(word, other, random.choice([1, -1])))
