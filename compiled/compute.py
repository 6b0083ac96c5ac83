"""The dtypes that a path computes in, and what is chosen where nobody says.

Hidden vectors and caches are kept in the compute dtype. What happens within a component is done in the accumulation
dtype and rounded once at its end, as in the reference; so are positions, norms and scales kept in it, and logits
returned, since neighboring tokens would tie in a narrow dtype. Matrix products take their operands in the product
dtype.
"""

from collections.abc import Callable

import torch

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

DEFAULT = torch.float32
"""For CPUs without 16-bit products it is the fastest."""

ONEDNN_DTYPE = torch.float32
"""The dtype whose products are oneDNN's own operator where there is one (`linear.product`)."""

_has_onednn: Callable[[], bool] = torch.backends.mkldnn.is_available  # untyped in torch

_CPU_MULTIPLIES = {
    torch.float32: True,
    torch.float64: True,
    torch.bfloat16: _has_onednn() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    torch.float16: _has_onednn() and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported()),
}
"""Whether this processor has matrix products of the dtype; found out here, since no graph may ask."""


def accumulation_dtype(compute: torch.dtype) -> torch.dtype:
    """Return the dtype that sums are kept in.

    >>> accumulation_dtype(torch.bfloat16), accumulation_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    # not torch.promote_types, which is an operator: recordings would hold it
    return compute if compute.itemsize >= DEFAULT.itemsize else DEFAULT


def product_dtype(compute: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of a matrix product's operands: compute, or float32 where a CPU has no such products."""
    return accumulation_dtype(compute) if device.type == "cpu" and not _CPU_MULTIPLIES[compute] else compute
