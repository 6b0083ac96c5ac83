"""python -m twinfer.bench: this project's compiled path beside transformers, on this machine.

Speeds come from one process that runs all candidates in turn. Memory comes from a process for each storage, as the
operating system counts it, less that of an interpreter that has imported torch.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..checkpoint import open_model
from ..compiled.path import CompiledPath
from ..spec.config import Storage
from ..spec.errors import TwinferError
from .peers import transformers_llama
from .side_by_side import Candidate, PathCandidate, Speeds, TransformersCandidate, measure

LENGTHS = [260, 300, 512]
PEER = "transformers eager"
_PEAK = "next(int(x.split()[1]) * 1024 for x in open('/proc/self/status') if x.startswith('VmHWM:'))"

messages = Console(stderr=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m twinfer.bench", description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2", help="folder, .gguf file or built-in name (smollm2)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds to take medians over (7)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    options = parser.parse_args(arguments)
    try:
        result = run(options.model, options.rounds)
    except TwinferError as error:
        messages.print(f"twinfer.bench: error: {error}", markup=False, highlight=False)
        return 2
    print(json.dumps(result)) if options.json else show(result)
    return 0


def run(model: str, rounds: int) -> dict[str, Any]:
    """Measure everything; the result is what --json prints."""
    checkpoint = open_model(model, report=messages.print)
    compile_s, prepared = {}, {}
    candidates: dict[str, Candidate] = {PEER: TransformersCandidate(transformers_llama(checkpoint.source))}
    for storage in Storage:
        path = CompiledPath(checkpoint.source, storage=storage)
        messages.print(f"compiling {storage}")
        compile_s[storage.value] = path.compile()
        prepared[storage.value] = path.weight_bytes
        candidates[f"compiled {storage}"] = PathCandidate(path)
    memory_rows = [memory(model, each, prepared[each.value], compile_s[each.value]) for each in Storage]
    speeds = measure(candidates, checkpoint.config.vocabulary, LENGTHS, rounds, messages.print)
    return {
        "model": checkpoint.name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "speed": rows(speeds),
        "memory": memory_rows,
    }


def rows(speeds: dict[str, Speeds]) -> list[dict[str, Any]]:
    """Each implementation's medians, and how many times the peer's they are."""
    peer = speeds[PEER]
    return [
        {
            "implementation": name,
            "decode_tokens_per_s": own.decode_tokens_per_s,
            "decode_ratio": own.decode_tokens_per_s / peer.decode_tokens_per_s,
            "prefill_tokens_per_s": {n: own.prefill_tokens_per_s(n) for n in LENGTHS},
            "prefill_512_ratio": own.prefill_tokens_per_s(512) / peer.prefill_tokens_per_s(512),
        }
        for name, own in speeds.items()
    ]


def memory(model: str, storage: Storage, prepared_bytes: int, compile_s: float) -> dict[str, Any]:
    """Peak memory of a whole `twinfer generate`, beyond that of an interpreter that has imported torch."""
    messages.print(f"memory of {storage}, in a process of its own")
    bare = int(_run([sys.executable, "-c", f"import torch; print({_PEAK})"]))
    command = [sys.executable, "-m", "twinfer", "generate", model, "--prompt-ids", ",".join(["504"] * 64)]
    command += ["--max-new-tokens", "32", "--temperature", "0", "--storage", storage, "--json"]
    peak = json.loads(_run(command))
    beyond = peak["peak_memory_bytes"] - bare
    return {
        "storage": storage.value,
        "first_compile_s": compile_s,
        "warm_compile_s": peak["timings"]["compile_s"],
        "prepared_weight_bytes": prepared_bytes,
        "beyond_torch_bytes": beyond,
        "allowed_bytes": int(1.5 * prepared_bytes) + 150 * 2**20,
    }


def show(result: dict[str, Any]) -> None:
    """The result as two tables."""
    screen = Console()
    speed = Table(
        title=f"{result['model']}: tokens/s, medians of {result['rounds']} rounds, {result['threads']} threads"
    )
    for title in ("implementation", "decode", "ratio", *(f"prefill {n}" for n in LENGTHS), "ratio at 512"):
        speed.add_column(title, justify="left" if title == "implementation" else "right")
    for row in result["speed"]:
        prefill = [f"{rate:.0f}" for rate in row["prefill_tokens_per_s"].values()]
        ratios = f"{row['decode_ratio']:.2f}", f"{row['prefill_512_ratio']:.2f}"
        speed.add_row(row["implementation"], f"{row['decode_tokens_per_s']:.1f}", ratios[0], *prefill, ratios[1])
    screen.print(speed)
    table = Table(title="compile seconds, and peak MiB beyond an interpreter that has imported torch")
    for title in ("storage", "compile", "compile again", "prepared weights", "peak", "1.5 x weights + 150"):
        table.add_column(title, justify="left" if title == "storage" else "right")
    for row in result["memory"]:
        sizes = [row[key] / 2**20 for key in ("prepared_weight_bytes", "beyond_torch_bytes", "allowed_bytes")]
        seconds = (f"{row['first_compile_s']:.1f}", f"{row['warm_compile_s']:.1f}")
        table.add_row(row["storage"], *seconds, *(f"{size:.0f}" for size in sizes))
    screen.print(table)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise TwinferError(f"{' '.join(command[:4])} ... failed: {done.stderr.strip() or done.returncode}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
