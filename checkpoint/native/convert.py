"""Writing an opened model in the twinfer form, and opening that form again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...spec.config import Storage
from ...spec.errors import RequestError
from ..config_json import to_json
from ..model import Checkpoint
from . import folder as twinfer_folder
from .encoding import Quantizers


def about_model(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return as JSON what there is to know of a model besides config, weights and tokenizer."""
    return {
        "name": checkpoint.name,
        "end_tokens": list(checkpoint.end_tokens),
        "chat_template": checkpoint.chat_template,
        "special_tokens": checkpoint.special_tokens,
        "embedding": to_json(checkpoint.embedding),
        "no_tokenizer": checkpoint.no_tokenizer,
    }


def convert(
    checkpoint: Checkpoint,
    folder: Path,
    storage: Storage,
    report: Callable[[str], None],
    *,
    quantizers: Quantizers,
) -> int:
    """Write a model as a folder that needs nothing else, one part in memory at a time; returns the bytes written.

    It is quantized by `quantizers`, those of a path: `twinfer.converting.convert` brings the reference's.

    Opened again with the same storage it is the same model, bit by bit. Raises `RequestError` where it is kept in
    another storage already, and what `twinfer_folder.write` raises.
    """
    if checkpoint.storage not in (None, storage):
        raise RequestError(
            f"{checkpoint.name} is kept in {checkpoint.storage} already; convert the model that it came from, or use "
            f"storage={checkpoint.storage}"
        )
    return twinfer_folder.write(
        checkpoint.source,
        folder,
        storage,
        quantizers=quantizers,
        about=about_model(checkpoint),
        tokenizer=checkpoint.tokenizer,
        report=report,
    )
