"""A layer fetched by N devices, each a part of it over its own link, and gathered on all (the paper's section VI-B).

Parts are of bytes, not of rows: whatever a layer consists of, each device fetches as much as the others.
"""

import torch
from torch import Tensor


def partition(flat: Tensor, devices: int, device: int) -> Tensor:
    """Return what a device fetches of a flat tensor: the device's n-th of it, filled up with zeros to equal parts.

    >>> [partition(torch.arange(5), 2, device).tolist() for device in range(2)]
    [[0, 1, 2], [3, 4, 0]]
    """
    each = -(-len(flat) // devices)
    part = torch.zeros(each, dtype=flat.dtype, device=flat.device)
    own = flat[device * each : (device + 1) * each]
    part[: len(own)] = own
    return part


def all_gather(parts: list[Tensor], length: int) -> Tensor:
    """Return the whole of all devices' parts, without what filled them up: what each device holds afterwards."""
    return torch.cat(parts)[:length]
