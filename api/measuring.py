"""One path answering and timed in a subprocess, so that its peak memory is its own."""

from collections.abc import Callable
from dataclasses import dataclass

from twinfer.bench.subprocesses import run_in_subprocess

from .commands.console import waiting
from .generation import generate
from .loading import load
from .memory import peak_memory_bytes

PARAGRAPH = """\
The keeper of the lighthouse wrote down the weather every evening, and for thirty years he had never missed a line. On
the first night of winter the lamp went out. He climbed the stairs with a candle, found nothing broken, and sat down to
listen to the sea. """
"""What the timed prompt is made of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    model: str
    path: str
    storage: str
    question: str
    prompt_tokens: int = 256
    """How long the timed prompt is."""
    new_tokens: int = 33
    """How many tokens the timed run adds; all but the first count as decoding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    path: str
    storage: str
    question_ids: list[int]
    answer_ids: list[int]
    answer: str
    timed_ids: list[int]
    """The timed prompt: `PARAGRAPH` over and over."""
    continuation_ids: list[int]
    """What followed the timed prompt; an end token does not stop it."""
    load_s: float
    compile_s: float
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    peak_memory_bytes: int | None


def measure(task: Task, report: Callable[[str], None] | None = None) -> Measurement:
    """Load, answer the question (continue it, without a chat template), then time a longer prompt, everything warm."""
    model = load(task.model, task.path, task.storage, batches=False, report=report)
    chat = model.checkpoint.chat_template is not None
    (answer,) = model.generate([task.question], chat=chat, max_new_tokens=48).outputs()
    timed = (model.tokenize(PARAGRAPH) * task.prompt_tokens)[: task.prompt_tokens]
    generation = generate(model.decoder, [timed], max_new_tokens=task.new_tokens)
    (continuation,) = generation.outputs()
    return Measurement(
        path=task.path,
        storage=task.storage,
        question_ids=list(answer.prompt_ids),
        answer_ids=list(answer.ids),
        answer=answer.text or "",
        timed_ids=timed,
        continuation_ids=list(continuation.ids),
        load_s=model.load_s,
        compile_s=model.compile_s,
        prefill_tokens_per_s=generation.timings.prefill_tokens_per_s,
        decode_tokens_per_s=generation.timings.decode_tokens_per_s,
        peak_memory_bytes=peak_memory_bytes(),
    )


def measure_in_subprocess(task: Task) -> Measurement:
    """Measure in a subprocess, which says on our standard error what it waits for; its errors are raised here."""
    return run_in_subprocess(_measure_and_report, task, what=f"{task.path} {task.storage}")


def _measure_and_report(task: Task) -> Measurement:
    with waiting() as report:
        return measure(task, report)
