"""The dtypes that a path computes in, and what is chosen where nobody says.

Hidden vectors and caches are kept in the compute dtype. What happens within a component is done in the accumulation
dtype and rounded once at its end, as in the reference; so are positions, norms and scales kept in it, and logits
returned, since neighboring tokens would tie in a narrow dtype.
"""

import torch

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

DEFAULT = torch.float32
"""For CPUs without 16-bit products it is the fastest."""


def accumulation_dtype(compute: torch.dtype) -> torch.dtype:
    """Return the dtype that sums are kept in.

    >>> accumulation_dtype(torch.bfloat16), accumulation_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(compute, torch.float32)
