"""What a child process does: damages a model, opens it, answers, and says what came of it."""

import os
import resource
import tempfile
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

import twinfer
from twinfer.spec.errors import TwinferError

from .damage import damaged

MEMORY = 2**30
"""Bytes that a mutant may take beyond what the process has before it."""


def serve(connection: Connection, models: list[Path], seed: int) -> None:
    """Answer one index after the other: with what came of the mutant, and a word about it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries print when they panic
    usual = {model: answer(model) for model in models}
    limit = _held() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection.send("ready")
    while True:
        index = connection.recv()
        connection.send(tried(models, usual, seed, index))


def tried(models: list[Path], usual: dict[Path, str], seed: int, index: int) -> tuple[str, str]:
    model = models[index % len(models)]
    with tempfile.TemporaryDirectory() as folder:
        mutant = damaged(model, Path(folder), mutant_random(seed, index))
        try:
            found = answer(mutant)
        except TwinferError as error:
            message = str(error)
            return ("handled", message) if message.isprintable() else ("crash", f"a message of lines: {message!r}")
        except MemoryError:
            return "memory", "MemoryError"
        except BaseException as error:
            out_of_memory = "alloc" in str(error) and "memory" in str(error)
            return "memory" if out_of_memory else "crash", traceback.format_exc()
    return ("same" if found == usual[model] else "other"), found


def mutant_random(seed: int, index: int) -> Random:
    return Random(f"{seed}:{index}")


def answer(path: Path) -> str:
    """A few tokens of a model, and texts through its tokenizer and template; vectors of an encoder, in short."""
    model = twinfer.load(str(path), path="reference")
    text = model.checkpoint.tokenizer is not None
    if not model.config.extensible:
        vectors = model.embed([[1, 2, 3], *(["abc the"] if text else [])])
        return str(vectors[:, :3].tolist())
    prompts: list[str | list[int]] = [[1 % model.config.vocabulary, 2 % model.config.vocabulary]]
    found = [str(model.generate(prompts, max_new_tokens=3).outputs()[0].ids)]
    if text:
        output = model.generate(["abc the"], max_new_tokens=2).outputs()[0]
        found.append(f"{output.ids} {output.text!r}")
    if text and model.checkpoint.chat_template is not None:
        found.append(str(model.generate(["hi"], chat=True, max_new_tokens=2).outputs()[0].ids))
    return "; ".join(found)


def _held() -> int:
    """Bytes of address space in use."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
