"""`twinfer generate`: continue prompts, streaming the text."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

from twinfer.reference.sampling import Sampling
from twinfer.spec.decoder import Path
from twinfer.spec.errors import RequestError

from ..chat import DATE, prompt_ids
from ..generation import Generation, Output, check_prompts, check_stops
from ..loading import Model, load, open_checkpoint
from ..memory import peak_memory_bytes
from ..paths import Compute
from ..store_source import StoreSource
from .console import print_json, waiting
from .degrees import (
    add_degrees,
    as_member,
    check_request,
    degrees_of,
    device_of,
    follow_leader,
    in_job,
    leading,
    start_ranks,
    streaming_leader,
)
from .options import (
    add_arithmetic,
    add_context,
    add_json,
    add_memory_budget,
    add_model,
    batch_size,
    read_lines,
    token_ids,
    unicode_text,
)

if TYPE_CHECKING:
    from twinfer.checkpoint import Checkpoint
    from twinfer.offload.expert_report import ExpertReport, RankReports
    from twinfer.parallel.member import Member

NAME, HELP = "generate", "continue prompts, streaming the text"
DESCRIPTION = "Continue one prompt or many, all at once as one batch."
EPILOG = """\
examples:
  twinfer generate smollm2 --chat --prompt "What is the capital of France?"
  twinfer generate ./my-llama --path reference --prompt-ids 504,3575,282,4649,314 --max-new-tokens 4 --json

with --json, one object: {"model", "path", "storage", "compute", "device",
  "outputs": [{"prompt_ids", "ids", "text", "stop"}],
  "timings": {"load_s", "compile_s", "prefill_s", "decode_s", "prefill_tokens_per_s", "decode_tokens_per_s"},
  "peak_memory_bytes"}, and for a store with experts "experts": {"kept", "spare", "needed", "found", "read_bytes",
  "prompt_bytes", "guessed", "guessed_right", "hit_rate", "bound_bytes"}, of many ranks summed up, with "ranks", those
  of each
  ids    the new tokens, the end token included if it came; text leaves it out (null without a tokenizer)
  stop   "end": an end token came; "length": --max-new-tokens are there; "stop": a --stop string came
  prefill_s runs from the prompts to the first new token of each, decode_s from there to the end; both add up over
  all prompts at once. prefill_tokens_per_s counts prompt tokens, decode_tokens_per_s new tokens without the first of
  each prompt; null where there are none. peak_memory_bytes is the most this process had resident at once.
  kept experts stay in memory, spare slots are read into; steps needed experts, and found some of them there;
  read_bytes were read for steps, and bound_bytes would have been by a cache of that size that knows the future
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", type=unicode_text, metavar="TEXT", help="the prompt")
    prompts.add_argument("--prompt-ids", type=token_ids, metavar="IDS", help="the prompt as token ids: 504,3575,282")
    prompts.add_argument(
        "--prompts-file", metavar="FILE", help="UTF-8 text, one prompt a line, blank lines skipped; - is standard input"
    )
    parser.add_argument("--chat", action="store_true", help="put each prompt as a user's turn into the chat template")
    parser.add_argument(
        "--chat-date",
        metavar="DAY",
        default=DATE,
        help="the date that chat templates see, always the same unless given (default %(default)s)",
    )
    add_arithmetic(parser)
    add_context(parser)
    add_memory_budget(parser)
    add_degrees(parser)
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="at most (default %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default %(default)s)"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest that add up to P")
    parser.add_argument(
        "--min-p", type=float, metavar="P", help="draw from those at least P times as likely as the best"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: repeat less (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default %(default)s)")
    parser.add_argument(
        "--stop",
        type=unicode_text,
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; repeatable",
    )
    parser.add_argument(
        "--output", type=FilePath, metavar="FILE", help="write results here as they finish, one JSON a line"
    )
    parser.add_argument(
        "--batch",
        type=batch_size,
        metavar="B",
        help="with --output: prompts at a time, or auto, as many as hide a store's reads (default: all)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    if args.chat and args.prompt_ids is not None:
        raise RequestError("--chat takes text, not --prompt-ids; give the ids of the whole conversation without --chat")
    sampling = Sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
    )
    prompts = _prompts(args)
    if args.batch is not None and args.output is None:
        raise RequestError("--batch is given without --output; give a file that results are written to")
    parallel = degrees_of(args)
    with waiting() as report:
        start = time.perf_counter()
        checkpoint = open_checkpoint(args.model, report, context=args.context)
        ids = prompt_ids(checkpoint, prompts, chat=args.chat, date=args.chat_date)
        check_prompts(checkpoint.config, ids, args.max_new_tokens)  # before minutes of compiling
        check_stops(args.stop, checkpoint.tokenizer)
        opening_s = time.perf_counter() - start
    if parallel.ranks == 1 and not in_job():
        return _generate(args, checkpoint, ids, sampling, opening_s)
    check_request(checkpoint, parallel, args)
    if not in_job():
        if isinstance(checkpoint.source, StoreSource):
            from ..stores import check_budget_of_ranks

            budgets, at_once = (args.memory_budget, args.dram_budget), _at_once(args, ids)
            given = budgets, at_once, _reserve(args, ids), Compute(args.compute)
            check_budget_of_ranks(checkpoint.source, parallel, *given)
        return start_ranks(args.words, parallel)
    with as_member(checkpoint, parallel, args) as member:
        return _generate(args, checkpoint, ids, sampling, opening_s, member)


def _generate(
    args: argparse.Namespace,
    checkpoint: "Checkpoint",
    ids: Sequence[Sequence[int]],
    sampling: Sampling,
    opening_s: float,
    member: "Member | None" = None,
) -> int:
    with waiting() as report:
        how = args.path, args.storage, args.compute, device_of(args, member)
        budget = args.memory_budget
        if budget is not None and member is None and isinstance(checkpoint.source, StoreSource):
            from ..stores import check_budget

            check_budget(checkpoint.source, budget, _at_once(args, ids), _reserve(args, ids), Compute(args.compute))
        model = load(
            checkpoint,
            *how,
            batches=len(ids) > 1,
            memory_budget=budget,
            dram_budget=args.dram_budget,
            report=report,
            member=member,
        )
    if member is not None and not member.leads:
        follow_leader(model.decoder, member)
        return 0
    model = replace(model, load_s=opening_s + model.load_s)
    with leading(model.decoder):
        if args.output is not None:
            return _run_batches(args, model, ids, sampling)
        generation = model.generate(
            ids, max_new_tokens=args.max_new_tokens, stop=args.stop, sampling=sampling, seed=args.seed
        )
        if args.json:
            print_json(report_of(model, args.model, generation))
        else:
            _stream(generation, len(ids), text=model.checkpoint.tokenizer is not None)
            experts = _experts(model)
            if experts is not None:
                print(experts.line, file=sys.stderr)
    return 0


def _run_batches(args: argparse.Namespace, model: Model, ids: Sequence[Sequence[int]], sampling: Sampling) -> int:
    """Run the prompts in batches whose results are kept; a run that was killed is gone on with."""
    from ..batches import run_batches

    def some(numbers: Sequence[int]) -> Iterator[tuple[int, Output]]:
        prompts = [ids[number] for number in numbers]
        options = {"stop": args.stop, "sampling": sampling, "seed": args.seed, "numbers": numbers}
        return model.generate(prompts, max_new_tokens=args.max_new_tokens, **options).finished()

    reserve = _reserve(args, ids)
    batch = len(ids) if args.batch is None else args.batch
    if batch == "auto":
        batch = _batch(model, reserve, len(ids))
    request = [args.max_new_tokens, asdict(sampling), args.seed, args.stop]
    request += [model.storage.value, model.compute.value, model.checkpoint.name]
    with waiting() as report:
        ran = run_batches(args.output, ids, request, batch, some, report)
    print(f"{args.output}: {len(ids)} results, {ran} of them new, {batch} at a time")
    return 0


def _at_once(args: argparse.Namespace, ids: Sequence[Sequence[int]]) -> int:
    """Return how many prompts run at once, at least."""
    at_once: int = {None: len(ids), "auto": 1}.get(args.batch, args.batch)
    return at_once


def _reserve(args: argparse.Namespace, ids: Sequence[Sequence[int]]) -> int:
    return max(len(prompt) for prompt in ids) + int(args.max_new_tokens)


def _batch(model: Model, reserve: int, prompts: int) -> int:
    """Return how many prompts to run at once: of a store as many as hide its reads, else all."""
    if model.path is not Path.OFFLOAD:
        return prompts
    from twinfer.offload.measuring import best_batch
    from twinfer.offload.path import OffloadPath

    if isinstance(model.decoder, OffloadPath):
        return best_batch(model.decoder, reserve, prompts)
    leader, path = streaming_leader(model.decoder)
    return path.job.best_batch(partial(leader.everywhere, "measure"), reserve, prompts)


def report_of(model: Model, name: str, generation: Generation) -> dict[str, Any]:
    """Run the generation to its end and say everything about it; the keys are described in EPILOG."""
    outputs = generation.outputs()
    timings = generation.timings
    experts = _experts(model)
    return {
        "model": name,
        "path": model.path.value,
        "storage": model.storage.value,
        "compute": model.compute.value,
        "device": str(model.decoder.device),
        "outputs": [asdict(output) for output in outputs],
        "timings": {
            "load_s": model.load_s,
            "compile_s": model.compile_s,
            "prefill_s": timings.prefill_s,
            "decode_s": timings.decode_s,
            "prefill_tokens_per_s": timings.prefill_tokens_per_s,
            "decode_tokens_per_s": timings.decode_tokens_per_s,
        },
        "peak_memory_bytes": peak_memory_bytes(),
        **({} if experts is None else {"experts": experts.as_json()}),
    }


def _experts(model: Model) -> "ExpertReport | RankReports | None":
    """Return what was read of experts; None for models that are no stores with experts."""
    if model.path is not Path.OFFLOAD:
        return None
    from twinfer.offload.expert_report import RankReport, RankReports
    from twinfer.offload.path import OffloadPath

    if isinstance(model.decoder, OffloadPath):
        return model.decoder.experts
    if not model.decoder.config.mixtures:
        return None
    leader, _ = streaming_leader(model.decoder)
    return RankReports([RankReport(counts=each) for each in leader.everywhere("expert_counts")])


def _prompts(args: argparse.Namespace) -> Sequence[str | list[int]]:
    if args.prompts_file is not None:
        return read_lines(args.prompts_file, "prompt")
    return [args.prompt if args.prompt is not None else args.prompt_ids]


def _stream(generation: Generation, prompts: int, *, text: bool) -> None:
    """Print what each prompt yields, in the prompts' order: the first unfinished one as it comes, later ones held."""
    held = [f"--- prompt {index}\n" if prompts > 1 else "" for index in range(prompts)]
    ended = [False] * prompts
    current = 0
    for event in generation:
        held[event.prompt] += event.text if text else f"{event.token} "
        ended[event.prompt] = event.stop is not None
        while current < prompts:
            print(held[current], end="", flush=True)
            held[current] = ""
            if not ended[current]:
                break
            print(flush=True)
            current += 1
