"""Texts as vectors: a model's hidden vectors of a text's tokens, made into one.

Shapes: N texts, T_i tokens of text i, M elements of a vector.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from twinfer.reference.pooling import pool, unit_length
from twinfer.spec.ambient import pinned
from twinfer.spec.config import Pooling
from twinfer.spec.decoder import Decoder, Encoder
from twinfer.spec.errors import NumericsError, RequestError

from .chat import as_ids, check_several

if TYPE_CHECKING:
    from twinfer.checkpoint import Checkpoint, EmbeddingRecipe

AT_ONCE = 128
"""How many texts are encoded before they are pooled; it bounds the memory that hidden vectors take."""


def text_ids(checkpoint: "Checkpoint", texts: Sequence[str | Sequence[int]]) -> list[list[int]]:
    """Each text's token ids, special ones included. What is ids already stays as it is.

    Nothing is ever cut off: raises `RequestError` for a text of more tokens than the model, or the recipe that came
    with it, is made for; also where there is no text, one says nothing, or the model has no tokenizer.
    """
    check_several("texts", texts)
    if not texts:
        raise RequestError("there are 0 texts; give at least one")
    return [
        _ids(checkpoint, index, text) if isinstance(text, str) else as_ids(f"text {index}", text)
        for index, text in enumerate(texts)
    ]


def _ids(checkpoint: "Checkpoint", index: int, text: str) -> list[int]:
    tokenizer, recipe, context = checkpoint.needed_tokenizer(), checkpoint.embedding, checkpoint.config.context
    if recipe.lower_case:
        text = text.lower()
    if not tokenizer.encode(text, special=False):
        raise RequestError(f"text {index} is {text[:40]!r}, in which the model sees nothing; give text")
    ids = tokenizer.encode(text)
    most = min(context, recipe.most_tokens or context)
    if len(ids) > most:
        made_for = f"the model's context is {context}"
        if most < context:
            made_for = f"the model's makers allow {most} (its context is {context})"
        raise RequestError(
            f"text {index} has {len(ids)} tokens, special ones included, and {made_for}; shorten it, or embed it in "
            "pieces: nothing is cut off for you"
        )
    return ids


def chosen(recipe: "EmbeddingRecipe", pooling: str | None, normalize: bool | None) -> tuple[Pooling, bool]:
    """The pooling and normalization asked for, else the makers'. Raises `RequestError` where neither is known."""
    if pooling is not None and pooling not in list(Pooling):
        raise RequestError(f"pooling is {pooling!r}; it must be one of {', '.join(Pooling)}")
    use_pooling = recipe.pooling if pooling is None else Pooling(pooling)
    use_normalize = recipe.normalize if normalize is None else normalize
    if use_pooling is None or use_normalize is None:
        missing = f"pooling ({' or '.join(Pooling)})" if use_pooling is None else ""
        both = " and " if use_pooling is None and use_normalize is None else ""
        missing += both + ("normalize" if use_normalize is None else "")
        raise RequestError(f"{recipe.unknown}; to embed in another way than the makers, choose {missing}")
    return use_pooling, use_normalize


def embed(path: Decoder | Encoder, ids: Sequence[Sequence[int]], pooling: Pooling, normalize: bool) -> Tensor:
    """One vector for each text, [N, M], on the path's device, float32 (float64 where it computes in float64).

    Raises `RequestError` where the path does not encode or `check_encoding` objects, and `NumericsError` for vectors
    that are not finite.
    """
    if not isinstance(path, Encoder):
        raise RequestError(f"{type(path).__name__} encodes no texts; use path=reference")
    with pinned(path.device):
        vector_NM = torch.stack([pool(hidden_TM, pooling) for hidden_TM in _hidden(path, ids)])
        if not vector_NM.isfinite().all():
            index = int((~vector_NM.isfinite()).any(-1).nonzero()[0])
            raise NumericsError(f"the vector of text {index} is not finite; the weights or the arithmetic overflow")
        return unit_length(vector_NM) if normalize else vector_NM


def _hidden(path: Encoder, ids: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    for begin in range(0, len(ids), AT_ONCE):
        tokens = [torch.tensor(each, dtype=torch.int64, device="cpu") for each in ids[begin : begin + AT_ONCE]]
        for hidden_TM in path.encode(tokens):
            yield hidden_TM.to(torch.promote_types(hidden_TM.dtype, torch.float32))


def cosines(vector_NM: Tensor) -> Tensor:
    """The cosine of the angle between every two texts, [N, N], float64; 0 where a vector has no direction."""
    unit_NM = unit_length(vector_NM.double())
    return unit_NM @ unit_NM.T
