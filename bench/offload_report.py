"""All that is measured of stores, in tables: `python -m twinfer.bench.offload_report FOLDER [PART...]`.

Each part runs in processes of its own, one after another, and keeps its rows in FOLDER/PART.jsonl: a part that is there
is not measured again. Stores are built in FOLDER where they are missing, 11 GB in all. What a part needs that is not
there, such as the peer of `accelerate`, leaves its table out and is said.

    stores       bytes, seconds and peak memory of building SmolLM2 in each storage
    settings     predictions beside measurements (`offload_settings`)
    accelerate   accelerate's disk offload beside ours (`peers.offload`)
    weights      weights that stay in memory against a larger batch (`resident_weights`)
    limited      a dense model and a mixture within a memory control group (`beyond_memory`, `experts_beyond_memory`)
    policies     what caches of experts read over the fewest possible (`expert_cache`)
    timeline     a chart of one decode step, FOLDER/timeline.png (`offload_timeline`)
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..spec.config import Storage

Row = dict[str, Any]

SETTINGS = (
    "smollm2 float32, one sequence",
    "smollm2 int8, one sequence",
    "smollm2 int8, batch 8",
    "smollm2 float32, batch 16",
    "smollm2 float32, auto",
    "smollm2 int8, batch 16, caches on disk",
)

TEXT = Path(__file__).parents[1] / "README.md"


def stores(folder: Path) -> Iterator[Row]:
    """Yield what building SmolLM2 takes in each storage; a store that was there is built again elsewhere."""
    for storage in Storage:
        place = folder / f"smollm2-{storage}"
        words = ["offload", "build", "smollm2", str(place), "--storage", storage.value, "--json"]
        if place.exists():
            raise SystemExit(f"{place} is there already; remove it, so that building it is measured")
        begin_s = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "twinfer.commands.main", *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        if status != 0:
            raise SystemExit(f"twinfer {' '.join(words)} ended with status {os.waitstatus_to_exitcode(status)}")
        yield {
            "storage": storage.value,
            "bytes": json.loads(said)["bytes"],
            "processor_s": used.ru_utime + used.ru_stime,
            "passed_s": time.perf_counter() - begin_s,
            "peak_bytes": used.ru_maxrss * 1024,
        }


def settings(folder: Path) -> Iterator[Row]:
    for name in SETTINGS:
        yield from of_bench("offload_settings", folder, name)


def accelerate(folder: Path) -> Iterator[Row]:
    yield from of_bench("peers.offload", folder, "smollm2")


def weights(folder: Path) -> Iterator[Row]:
    for report in of_bench("resident_weights", folder / "resident_weights"):
        yield from report["rows"]


def limited(folder: Path) -> Iterator[Row]:
    for bench in ("beyond_memory", "experts_beyond_memory"):
        for row in of_bench(bench, folder / bench):
            yield {"bench": bench, **row}


def policies(folder: Path) -> Iterator[Row]:
    for model in ("tiny-moe", "smollm2"):
        yield from of_bench("expert_cache", model, TEXT)


def timeline(folder: Path) -> Iterator[Row]:
    chart = folder / "timeline.png"
    of_bench("offload_timeline", folder / "smollm2-float32", 128 * 10**6, chart)
    yield {"chart": str(chart)}


PARTS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "stores": stores,
    "settings": settings,
    "accelerate": accelerate,
    "weights": weights,
    "limited": limited,
    "policies": policies,
    "timeline": timeline,
}


def of_bench(name: str, *arguments: object) -> list[Row]:
    """Run a bench of this package in a process of its own; returns the objects that it prints."""
    command = [sys.executable, "-m", f"twinfer.bench.{name}", *map(str, arguments)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if ran.returncode != 0:
        print(f"{' '.join(command)} ended with status {ran.returncode}", file=sys.stderr, flush=True)
        return []
    return list(objects(ran.stdout))


def objects(text: str) -> Iterator[Row]:
    """Yield the JSON objects of a text, one after another, each on one line or on many.

    >>> list(objects('{"a": 1} {"a":\\n 2}'))
    [{'a': 1}, {'a': 2}]
    """
    decoder, text = json.JSONDecoder(), text.strip()
    while text:
        row, end = decoder.raw_decode(text)
        yield row
        text = text[end:].strip()


def measured(folder: Path, part: str) -> list[Row]:
    """Return a part's rows, from its file or measured now."""
    file = folder / f"{part}.jsonl"
    if not file.exists():
        rows = list(PARTS[part](folder))
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def stores_table(rows: Sequence[Row]) -> str:
    return table(
        ("SmolLM2 as", "store, bytes", "build, s", "of the processor, s", "peak, MB"),
        [
            (
                row["storage"],
                f"{row['bytes']:,}",
                f"{row['passed_s']:.1f}",
                f"{row['processor_s']:.1f}",
                f"{row['peak_bytes'] / 1e6:.0f}",
            )
            for row in rows
        ],
    )


def settings_table(rows: Sequence[Row], peers: Sequence[Row]) -> str:
    """Return settings with predictions over measurements; accelerate stands beside its own model, of one sequence."""
    return table(
        (
            "setting",
            "store, MB",
            "budget / planned, MB",
            "store over budget",
            "batch",
            "s a token, predicted / measured",
            "s a prompt token, predicted / measured",
            "of disk",
            "of GEMM",
            "accelerate over ours",
        ),
        [
            (
                row["setting"],
                f"{row['bytes'] / 1e6:.0f}",
                f"{row['budget'] / 1e6:.0f} / {row['planned'] / 1e6:.0f}",
                f"{row['bytes'] / row['budget']:.1f}",
                str(row["batch"]),
                beside(row["predicted_step_s"] / row["batch"], row["measured_step_s"] / row["batch"]),
                beside(row["predicted_prompt_token_s"], row["measured_prompt_token_s"]),
                f"{row['share_of_disk']:.2f}",
                f"{row['share_of_gemm']:.2f}",
                over_peer(row, peers),
            )
            for row in rows
        ],
    )


def beside(predicted: float, measured: float) -> str:
    """Return two numbers and the first over the second.

    >>> beside(0.5, 0.4)
    '0.5000 / 0.4000 (1.25)'
    """
    return f"{predicted:.4f} / {measured:.4f} ({predicted / measured:.2f})"


def over_peer(row: Row, peers: Sequence[Row]) -> str:
    """Return accelerate's seconds over ours for a setting of one sequence whose storage it was run beside."""
    storage = row["setting"].split(",")[0].split()[-1]
    found = [each["of_accelerate"][storage] for each in peers if storage in each["of_accelerate"]]
    return f"{found[0]:.1f}" if found and row["batch"] == 1 else ""


def accelerate_table(rows: Sequence[Row]) -> str:
    return table(
        ("model", "accelerate, s a token", "ours", "s a token", "accelerate over ours", "same tokens"),
        [
            (
                row["model"],
                f"{row['step_s']['accelerate']:.3f}",
                storage,
                f"{row['step_s'][storage]:.3f}",
                f"{ratio:.1f}",
                ("yes" if row["same_tokens_float32"] else "no") if storage == Storage.FLOAT32 else "",
            )
            for row in rows
            for storage, ratio in row["of_accelerate"].items()
        ],
    )


def weights_table(rows: Sequence[Row]) -> str:
    return table(
        (
            "tokens of a sequence",
            "share for weights",
            "kept / read a step, MB",
            "batch",
            "reading / computing, s",
            "s a step",
            "tokens a second",
        ),
        [
            (
                str(row["reserve"]),
                f"{row['share']:.0%}",
                f"{row['kept_bytes'] / 1e6:.0f} / {row['read_bytes'] / 1e6:.0f}",
                str(row["batch"]),
                f"{row['reading_s']:.2f} / {row['computing_s']:.2f}",
                f"{row['step_s']:.2f}",
                f"{row['tokens_per_s']:.0f}",
            )
            for row in rows
        ],
    )


def limited_table(rows: Sequence[Row]) -> str:
    return table(
        (
            "model",
            "store, MB",
            "limit beyond the interpreter, MB",
            "store over limit",
            "interpreter, MB",
            "used at most, MB",
            "read a token, MB",
            "s a token",
            "of disk",
            "same tokens",
            "same bits",
        ),
        [
            (
                row["bench"],
                *(f"{row[name] / 1e6:.1f}" for name in ("weights_bytes", "limit_beyond_bytes")),
                f"{row['ratio']:.1f}",
                *(f"{row[name] / 1e6:.1f}" for name in ("interpreter_bytes", "peak_beyond_bytes", "read_bytes_a_step")),
                f"{row['token_s']:.2f}",
                f"{row['share_of_disk']:.2f}",
                *("yes" if row[name] else "no" for name in ("same_tokens", "same_bits")),
            )
            for row in rows
        ],
    )


def policies_table(rows: Sequence[Row]) -> str:
    names = list(rows[0]["policies"])
    lines = [
        (name, *(f"{row['policies'][name]['over_best']:.3f} ({row['policies'][name]['hit_rate']:.0%})" for row in rows))
        for name in names
    ]
    best = ("knows the future", *(f"1 ({row['best_hit_rate']:.0%})" for row in rows))
    return table(("policy", *(f"{row['model']}, {row['tokens']} tokens" for row in rows)), [*lines, best])


def main(folder: Path, parts: Sequence[str]) -> None:
    """Measure what is missing, and print the tables of some parts."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {part: measured(folder, part) for part in PARTS if part in parts}
    if rows := found.get("stores"):
        print(stores_table(rows))
    if rows := found.get("settings"):
        print(settings_table(rows, found.get("accelerate", [])))
    if rows := found.get("accelerate"):
        print(accelerate_table(rows))
    if rows := found.get("weights"):
        print(weights_table(rows))
    if rows := found.get("limited"):
        print(limited_table(rows))
    if rows := found.get("policies"):
        print(policies_table(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(PARTS))
