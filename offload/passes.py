"""The calls that a step consists of: passes over rows that gain one token, and pieces of prompts.

They are cut as in the compiled path, so that each row is computed in the company that it has there.

Shapes: R sequences that gain one token, T prompt tokens of one sequence, S key positions.
"""

from collections.abc import Sequence

import torch

from ..compiled.linear import PASS_ROWS, passes
from ..compiled.programs import Program
from .calls import Call, Pending
from .kv_stream import Span
from .plan import PREFILL_TOKENS, call_bytes
from .programs import StreamedPrograms
from .sequences import TieredSequences


def calls_of(programs: StreamedPrograms, sequences: TieredSequences, tokens: Sequence[Sequence[int]]) -> list[Pending]:
    """Return the calls by which each sequence gains its tokens: single ones together, prompts one by one."""
    single = [row for row, each in enumerate(tokens) if len(each) == 1]
    pending = _decode_calls(programs, sequences, single, [tokens[row][0] for row in single])
    for row, each in enumerate(tokens):
        if len(each) > 1:
            pending += _prefill_calls(programs, sequences, row, each)
    return pending


def _decode_calls(
    programs: StreamedPrograms, sequences: TieredSequences, rows: Sequence[int], tokens: Sequence[int]
) -> list[Pending]:
    """Return the passes of a decode step, in which rows run out as in the compiled path."""
    pending, device = [], programs.example.device
    for given in passes(len(rows), programs.example.store.storage) if rows else []:
        of_pass = [rows[each] for each in given]
        positions = [sequences.lengths[row] for row in of_pass]
        starts = [row * sequences.capacity for row in of_pass]
        ids = [tokens[each] for each in given]
        name = {1: Program.DECODE, PASS_ROWS: Program.DECODE_ROWS}.get(len(given), Program.DECODE_MANY)
        slot_S = torch.arange(max(2, max(positions) + 1), device=device)
        inputs = torch.tensor([ids, positions, starts], device=device), slot_S
        call = Call(programs.get(name), inputs, shared=(slot_S,), last_only=False)
        spans = [Span(row, sequences.lengths[row], sequences.lengths[row] + 1) for row in dict.fromkeys(of_pass)]
        nbytes = call_bytes(programs.example.store, programs.example.config, len(given), len(slot_S))
        pending.append(Pending(call, ids, of_pass, spans, True, nbytes))
    return pending


def _prefill_calls(
    programs: StreamedPrograms, sequences: TieredSequences, row: int, tokens: Sequence[int]
) -> list[Pending]:
    """Return the pieces of a prompt, which go through each layer one after the other."""
    program, device, pending = programs.get(Program.PREFILL), programs.example.device, []
    end, stop = sequences.lengths[row], sequences.lengths[row] + len(tokens)
    start_1 = torch.tensor([row * sequences.capacity], device=device)
    for piece_T in torch.tensor(tokens).tensor_split(-(-len(tokens) // PREFILL_TOKENS)):
        begin, end = end, end + len(piece_T)
        slot_S = torch.arange(end, device=device)
        call = Call(program, (piece_T.to(device), slot_S[begin:], start_1, slot_S), last_only=True)
        nbytes = call_bytes(programs.example.store, programs.example.config, len(piece_T), end)
        pending.append(Pending(call, piece_T.tolist(), [row], [Span(row, begin, end)], end == stop, nbytes))
    return pending
