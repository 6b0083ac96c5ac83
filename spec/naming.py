"""Names of dtypes, however they are given."""

import torch


def dtype_name(value: object) -> str:
    """Return the one name of a dtype, by which `Storage` and `compute` go; text that names no dtype stays as it is.

    >>> dtype_name(torch.float64), dtype_name("torch.float64"), dtype_name("double"), dtype_name("x")
    ('float64', 'float64', 'float64', 'x')
    """
    name = str(value).removeprefix("torch.")
    dtype = vars(torch).get(name)
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else name
