"""Products of the experts that tokens chose, for few tokens and for many.

Why it is faster: a decode step reads the packed words of the chosen experts only, indexed by a tensor within the loop
of the product (`chosen`), so that no expert is copied and nothing is read on the host. With many tokens the choices are
sorted by expert, and each expert's words are read once for all its rows, or once for every 4. That is an operator of
its own, since how many rows an expert has is known only when it runs: on a CPU it reads the counts and calls
`expert_kernels`, elsewhere it takes a form whose sizes do not depend on them: torch's grouped product for bfloat16, and
masks for other dtypes.

Three tokens with two choices each, of 4 experts (A = 6 choices):

    expert of choice     2 0  2 1  0 2
    sorted               choices 1 4 | 3 | 0 2 5 of experts 0, 1, 2; rows of each expert 2 1 3 0

What it relies on: the blocks of one expert's outputs hold no rows of another (`stack`).

Shapes: A choices (tokens times experts each), T tokens, K = top_k, E experts, N outputs, I inputs, B blocks of U
outputs of one expert, G groups.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..spec.config import Storage
from ..spec.weights import StackedLinearWeights
from .compute import product_dtype
from .expert_kernels import Kernels, Span, in_tiles, kernels_for, multiply_few, multiply_many
from .linear import expanded, product
from .packing import ROWS, AbsmaxOfRows, Matrix, own, pack, quantize


def stack(parts: Sequence[StackedLinearWeights], storage: Storage, of_rows: AbsmaxOfRows | None = None) -> Matrix:
    """Return the parts of each expert below one another, packed: a `Matrix` whose tensors have E in front.

    Without experts it holds only the number of outputs. Rows are quantized alone. Where words are packed, rows of zeros
    fill up the last block of each expert. `of_rows` is as in `quantize`, for the rows of all experts after each other.
    """
    weight_ENI = parts[0].weight_ENI if len(parts) == 1 else torch.cat([part.weight_ENI for part in parts], 1)
    biases = [part.bias_EN for part in parts if part.bias_EN is not None]
    bias_EN = torch.cat(biases, 1).detach().to(torch.float32, copy=True).contiguous() if biases else None
    experts, outputs, inputs = weight_ENI.shape
    if experts == 0:  # they are fetched (`fetching`)
        return Matrix(torch.empty(0), None, None, None, None, outputs)
    if storage is not Storage.FLOAT32 and outputs % ROWS:
        weight_ENI = functional.pad(weight_ENI, (0, 0, 0, -outputs % ROWS))
    packed = pack(quantize(weight_ENI.detach().reshape(-1, inputs), storage, of_rows))

    def by_expert(part: Tensor | None) -> Tensor | None:
        return None if part is None else own(part.view(experts, -1, *part.shape[1:]))

    return Matrix(
        word=own(packed.word.view(experts, -1, *packed.word.shape[1:])),
        scale_N=by_expert(packed.scale_N),
        scale_BGU=by_expert(packed.scale_BGU),
        min_BGU=by_expert(packed.min_BGU),
        bias_N=bias_EN,
        outputs=outputs,
    )


class Sorted(NamedTuple):
    """Choices by expert."""

    choice_A: Tensor
    """For each place the choice that stands there; choice a is of token a // K."""
    place_A: Tensor
    """For each choice its place."""
    rows_E: Tensor
    """How many choices each expert has, int64."""


def sort_by_expert(expert_TK: Tensor, experts: int) -> Sorted:
    """Sort the choices by expert; those of one expert stay in the order of their tokens.

    >>> sort_by_expert(torch.tensor([[2, 0], [2, 1], [0, 2]]), 4)
    Sorted(choice_A=tensor([1, 4, 3, 0, 2, 5]), place_A=tensor([3, 0, 4, 2, 1, 5]), rows_E=tensor([2, 1, 3, 0]))
    """
    expert_A = expert_TK.flatten()
    choice_A = torch.sort(expert_A, stable=True).indices
    place_A = torch.empty_like(choice_A).scatter_(0, choice_A, torch.arange(len(choice_A), device=choice_A.device))
    rows_E = (expert_A[:, None] == torch.arange(experts, device=expert_A.device)).sum(0)
    return Sorted(choice_A, place_A, rows_E)


def grouped_product(x_AI: Tensor, rows_E: Tensor, weights: Matrix, storage: Storage) -> Tensor:
    """Return rows sorted by expert, each times the matrix of its own, [A, N] in x's dtype.

    In a compiled graph a CPU does so by compiled kernels, elsewhere by torch's operators.
    """
    compiled = torch.compiler.is_compiling()
    out_AN: Tensor = torch.ops.twinfer.grouped_product(x_AI, rows_E, *weights, storage.value, compiled)
    return out_AN


@torch.library.custom_op("twinfer::grouped_product", mutates_args=())
def _grouped_product(
    x_AI: Tensor,
    rows_E: Tensor,
    word: Tensor,
    scale_N: Tensor | None,
    scale_BGU: Tensor | None,
    min_BGU: Tensor | None,
    bias_N: Tensor | None,
    outputs: int,
    storage: str,
    compiled: bool,
) -> Tensor:
    weights = Matrix(word, scale_N, scale_BGU, min_BGU, bias_N, outputs)
    if x_AI.device.type != "cpu":
        form = _by_offsets if _groups_rows(x_AI.dtype, x_AI.device, x_AI.shape[1], outputs) else _by_masks
        return form(x_AI, rows_E, weights, Storage(storage))
    kernels = kernels_for(Storage(storage), x_AI.dtype, compiled=compiled)
    out_AN, spans = x_AI.new_empty(len(x_AI), outputs), _spans(rows_E)
    few = [span for span in spans if compiled and in_tiles(span.rows, word[span.expert], Storage(storage))]
    if few:
        multiply_few(x_AI, few, weights, Storage(storage), kernels, out_AN)
    for span in (span for span in spans if span not in few):
        _multiply(x_AI, span, one_expert(weights, span.expert), Storage(storage), kernels, compiled, out_AN)
    return out_AN


def multiplied(
    x_AI: Tensor,
    rows_E: Tensor,
    matrices: Iterable[tuple[int, Matrix]],
    outputs: int,
    storage: Storage,
    compiled: bool,
) -> Tensor:
    """Return rows sorted by expert, each times the matrix of its own, [A, N]; the experts come in any order."""
    if x_AI.device.type != "cpu":
        return _masked(x_AI, rows_E, matrices, outputs, storage)
    kernels = kernels_for(storage, x_AI.dtype, compiled=compiled)
    out_AN, span_of = x_AI.new_empty(len(x_AI), outputs), {span.expert: span for span in _spans(rows_E)}
    for expert, matrix in matrices:
        _multiply(x_AI, span_of[expert], matrix, storage, kernels, compiled, out_AN)
    return out_AN


def _spans(rows_E: Tensor) -> list[Span]:
    """Return where each expert's rows are, for those that have any."""
    rows: list[int] = rows_E.tolist()
    ends = accumulate(rows)
    return [Span(expert, end - count, end) for expert, (count, end) in enumerate(zip(rows, ends, strict=True)) if count]


@_grouped_product.register_fake
def _(
    x_AI: Tensor,
    rows_E: Tensor,
    word: Tensor,
    scale_N: Tensor | None,
    scale_BGU: Tensor | None,
    min_BGU: Tensor | None,
    bias_N: Tensor | None,
    outputs: int,
    storage: str,
    compiled: bool,
) -> Tensor:
    return x_AI.new_empty(x_AI.shape[0], outputs)


def one_expert(weights: Matrix, expert: int) -> Matrix:
    """Return one expert's matrix, as views."""
    return _for_each_tensor(weights, lambda part: part[expert])


def _for_each_tensor(weights: Matrix, change: Callable[[Tensor], Tensor]) -> Matrix:
    def changed(part: Tensor | None) -> Tensor | None:
        return None if part is None else change(part)

    return weights._replace(
        word=change(weights.word),
        scale_N=changed(weights.scale_N),
        scale_BGU=changed(weights.scale_BGU),
        min_BGU=changed(weights.min_BGU),
        bias_N=changed(weights.bias_N),
    )


def _multiply(
    x_AI: Tensor, span: Span, one: Matrix, storage: Storage, kernels: Kernels, compiled: bool, out_AN: Tensor
) -> None:
    """Write one expert's rows times its matrix."""
    if compiled and in_tiles(span.rows, one.word, storage):
        alone = _for_each_tensor(one, lambda part: part[None])
        multiply_few(x_AI, [span._replace(expert=0)], alone, storage, kernels, out_AN)
    else:
        rows = slice(span.begin, span.end)
        multiply_many(x_AI[rows], _aligned(one, storage), storage, kernels, out_AN[rows])


def _aligned(one: Matrix, storage: Storage) -> Matrix:
    """Return a matrix that begins at a line of the caches, a copy if need be: of odd sizes, all experts but the first.

    Float32 products of the same numbers round differently at other places, so an expert that was read by itself would
    give other bits than one that lies between others.
    """
    if storage is not Storage.FLOAT32 or one.word.data_ptr() % _LINE_BYTES == 0:
        return one
    return one._replace(word=one.word.clone())


def _expanded(one: Matrix, storage: Storage, inputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return one expert's matrix, [N, I], and its bias."""
    return expanded(one, storage, inputs, dtype), None if one.bias_N is None else one.bias_N.to(dtype)


_LINE_BYTES = 64

_grouped_mm: Callable[..., Tensor] | None = getattr(torch, "_grouped_mm", None)  # untyped in torch

_ALIGNED = 8
"""Its rows are whole multiples of 16 bytes, that is of 8 numbers of bfloat16."""


def _groups_rows(dtype: torch.dtype, device: torch.device, inputs: int, outputs: int) -> bool:
    """Return whether torch's grouped product serves here: for bfloat16 on a GPU, once it was seen to be right."""
    aligned = inputs % _ALIGNED == 0 and outputs % _ALIGNED == 0
    return aligned and dtype is torch.bfloat16 and device.type == "cuda" and _groups_rightly(device)


@functools.cache
def _groups_rightly(device: torch.device) -> bool:
    """Compare it with a product an expert, on integers, which both add exactly. A graph is captured only after that."""
    if _grouped_mm is None:
        return False
    rows = [3, 0, 5]
    generator = torch.Generator().manual_seed(0)
    x_AI = torch.randint(-3, 4, (sum(rows), 16), generator=generator).to(device, torch.bfloat16)
    weight_ENI = torch.randint(-3, 4, (len(rows), 24, 16), generator=generator).to(device, torch.bfloat16)
    end_E = torch.tensor(rows, device=device).cumsum(0).to(torch.int32)
    try:
        found_AN = _grouped_mm(x_AI, weight_ENI.transpose(1, 2), offs=end_E)
    except RuntimeError:  # this GPU has none
        return False
    first_AN, last_AN = product(x_AI[: rows[0]], weight_ENI[0], None), product(x_AI[rows[0] :], weight_ENI[2], None)
    return torch.equal(found_AN, torch.cat([first_AN, last_AN]))


def _by_offsets(x_AI: Tensor, rows_E: Tensor, weights: Matrix, storage: Storage) -> Tensor:
    """Return the same by one product that is given where the rows of each expert end; every expert is expanded."""
    assert _grouped_mm is not None
    matrices = (one_expert(weights, expert) for expert in range(len(rows_E)))
    parts = [_expanded(one, storage, x_AI.shape[1], x_AI.dtype) for one in matrices]
    weight_ENI, end_E = torch.stack([weight_NI for weight_NI, _ in parts]), rows_E.cumsum(0)
    out_AN = _grouped_mm(x_AI, weight_ENI.transpose(1, 2), offs=end_E.to(torch.int32))
    return out_AN if weights.bias_N is None else out_AN + weights.bias_N[_expert_of(len(x_AI), end_E)].to(x_AI.dtype)


def _expert_of(choices: int, end_E: Tensor) -> Tensor:
    """Return the expert of each place, given where the places of each expert end."""
    return (torch.arange(choices, device=end_E.device)[:, None] >= end_E).sum(1)


def _by_masks(x_AI: Tensor, rows_E: Tensor, weights: Matrix, storage: Storage) -> Tensor:
    """Return the same without reading a count: every expert multiplies all rows, and those of others are masked.

    Slow with many experts, and legal within a CUDA graph.
    """
    matrices = ((expert, one_expert(weights, expert)) for expert in range(len(rows_E)))
    return _masked(x_AI, rows_E, matrices, weights.outputs, storage)


def _masked(
    x_AI: Tensor, rows_E: Tensor, matrices: Iterable[tuple[int, Matrix]], outputs: int, storage: Storage
) -> Tensor:
    """Return the same by the matrices of at least those experts that have rows, in any order."""
    dtype = product_dtype(x_AI.dtype, x_AI.device)
    expert_A = _expert_of(len(x_AI), rows_E.cumsum(0))
    out_AN = x_AI.new_zeros(len(x_AI), outputs)
    for expert, matrix in matrices:
        weight_NI, bias_N = _expanded(matrix, storage, x_AI.shape[1], dtype)
        of_expert_AN = product(x_AI.to(dtype), weight_NI, bias_N).to(x_AI.dtype)
        out_AN = torch.where((expert_A == expert)[:, None], of_expert_AN, out_AN)
    return out_AN
