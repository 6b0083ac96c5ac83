"""Which dtypes compute takes, which of them sums are kept in, and which a matrix product is done in.

Results are rounded to compute. Sums of 16-bit compute are float32, and so are softmax and the statistics of norms.
"""

import functools
from collections.abc import Callable

import torch

COMPUTES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

DEFAULT_COMPUTE = torch.float32

ONEDNN_DTYPE = torch.float32
"""The dtype whose products are oneDNN's own operator where there is one (`linear.product`)."""

_has_products: dict[torch.dtype, Callable[[], bool]] = {
    torch.bfloat16: lambda: bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    torch.float16: lambda: bool(torch.ops.mkldnn._is_mkldnn_fp16_supported()),
}


def accumulation_dtype(compute: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: float32 for 16-bit compute, else compute itself.

    >>> [accumulation_dtype(each) for each in (torch.bfloat16, torch.float64)]
    [torch.float32, torch.float64]
    """
    return torch.promote_types(compute, torch.float32)


def product_dtype(compute: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of a matrix product's operands: compute, or float32 where a CPU has no such products."""
    return accumulation_dtype(compute) if device.type == "cpu" and not _multiplies(compute) else compute


@functools.cache
def _multiplies(compute: torch.dtype) -> bool:
    if compute not in _has_products:
        return True
    return torch.backends.mkldnn.is_available() and _has_products[compute]()  # type: ignore[no-untyped-call]
