"""Writing a model in the twinfer form, quantized as the reference quantizes."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from twinfer.checkpoint import Checkpoint
from twinfer.checkpoint.native import convert as native
from twinfer.checkpoint.native.encoding import Quantizers
from twinfer.reference.quantize import quantize_groups, quantize_rows
from twinfer.spec.config import Storage


def convert(checkpoint: Checkpoint, folder: Path, storage: Storage, report: Callable[[str], None]) -> int:
    """Write a model as a folder that needs nothing else; returns the bytes written.

    Opened again with the same storage it is the same model, bit by bit, on both paths: they quantize alike.
    """
    return native.convert(checkpoint, folder, storage, report, quantizers=REFERENCE)


def _rows(weight_NI: Tensor) -> Tensor:
    return quantize_rows(weight_NI).quantized_NI


def _groups(weight_NI: Tensor) -> Tensor:
    return quantize_groups(weight_NI).quantized_NI


REFERENCE = Quantizers(rows=_rows, groups=_groups)
"""The quantizers of the reference, as files are encoded with them."""
