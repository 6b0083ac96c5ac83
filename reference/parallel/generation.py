"""Greedy generation on a pipeline's schedule: prompts in, new tokens out, on exactly the events of the schedule.

A micro-batch is made of neighboring rounds. Where prompts had more micro-batches than the tokens after them (`hybrid`),
neighbors are merged, and their keys and values with them: these are kept by sequence, so nothing is moved.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...spec.ambient import pinned
from ...spec.decoder import check_extensible, checked_tokens
from ...spec.errors import RequestError
from .job import Job
from .pipeline import execute
from .schedule import Schedule

Rounds = list[list[Tensor]]
"""What a micro-batch hands from stage to stage: of each of its rounds, what each rank holds."""


def generate(job: Job, prompts: Sequence[Tensor], schedule: Schedule) -> list[list[int]]:
    """Extend each prompt greedily by the schedule's number of tokens; returns the new tokens.

    Raises `RequestError` for a schedule that this job or this many prompts cannot follow, and for prompts that
    `Decoder.extend` would refuse.
    """
    rounds = job.rounds(len(prompts))
    check_extensible(job.config)
    if schedule.stages != job.parallel.pipeline:
        raise RequestError(f"the schedule has {schedule.stages} stages; the job has {job.parallel.pipeline}")
    if schedule.prompt_batches > len(rounds):
        raise RequestError(
            f"the schedule has {schedule.prompt_batches} micro-batches; {len(prompts)} prompts on {job.parallel.data} "
            f"data groups make at most {len(rounds)}"
        )
    checked_tokens(job.config, [0] * len(prompts), prompts)
    checked_tokens(job.config, [schedule.tokens - 1] * len(prompts), prompts)
    states = [job.new_sequence() for _ in prompts]
    last = [token_T.to(job.device) for token_T in prompts]
    new: list[list[int]] = [[] for _ in prompts]

    def members(micro_batch: int, token: int) -> list[range]:
        parts = schedule.batches(token)
        return rounds[micro_batch * len(rounds) // parts : (micro_batch + 1) * len(rounds) // parts]

    def enter(micro_batch: int, token: int, _: list[None]) -> Rounds:
        return [job.enter(each, states, last) for each in members(micro_batch, token)]

    def work(stage: int, micro_batch: int, token: int, value: Rounds) -> Rounds:
        pairs = zip(members(micro_batch, token), value, strict=True)
        return [job.work(stage, each, states, x_RBTM) for each, x_RBTM in pairs]

    def leave(micro_batch: int, token: int, value: Rounds) -> None:
        for each, x_RBTM in zip(members(micro_batch, token), value, strict=True):
            logits = job.leave([x_BTM[:, -1:] for x_BTM in x_RBTM])[: len(each)]
            for member, (index, logits_1V) in enumerate(zip(each, logits, strict=True)):
                last[index] = torch.argmax(logits_1V, -1)
                new[index].append(int(last[index]))
                job.tell_first_stage(last[index], member)

    with pinned(job.device):
        execute(schedule, enter, work, leave)
    return new
