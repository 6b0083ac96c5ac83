"""Comparing encoders: the hidden vectors of a candidate beside the reference's, text by text.

A row is one token of one text; its scale is the largest element of its true vector, max|T|. Whatever a text is encoded
together with, its rows are held against the same truth: the reference computes every text alone.

Shapes: T tokens of a text, W elements of its vectors.
"""

import torch

from ..spec.config import ModelConfig
from ..spec.decoder import Encoder
from .baseline import Baseline, worst_of
from .case import Picker
from .leaning import is_judged, leaning
from .paths import WHOLE_MODEL, PathComparison, PathMismatch, check_leaning
from .rows import judge_rows

Texts = tuple[tuple[int, ...], ...]
"""Token ids, or token types, of each text; plain data, so that a case prints as Python that makes it again."""


def draw_texts(pick: Picker, config: ModelConfig, *, most: int = 5, longest: int = 12) -> tuple[Texts, Texts | None]:
    """Texts of any lengths, and their types, where the model has some and they are not left out."""
    lengths = [pick.integer(1, min(longest, config.context)) for _ in range(pick.integer(1, most))]

    def drawn(values: int) -> Texts:
        return tuple(tuple(pick.integer(0, values - 1) for _ in range(length)) for length in lengths)

    typed = config.token_types > 0 and pick.choice([True, True, False])
    return drawn(config.vocabulary), drawn(config.token_types) if typed else None


@torch.no_grad()
def compare_encodings(
    baseline: Baseline, candidate: Encoder, texts: Texts, types: Texts | None = None
) -> PathComparison:
    """Have the reference and the candidate encode the texts, all in one call, and judge every row."""
    tokens = [torch.tensor(text) for text in texts]
    kinds = None if types is None else [torch.tensor(each) for each in types]
    truths = baseline.truth.encode(tokens, kinds)
    runs = [eager.encode(tokens, kinds) for eager in baseline.runs]
    device = candidate.device
    on_device = None if kinds is None else [each.to(device) for each in kinds]
    got = candidate.encode([each.to(device) for each in tokens], on_device)
    result = PathComparison()
    if len(got) != len(texts):
        result.failures.append(f"{len(got)} texts came back of {len(texts)}")
        return result
    for index, (truth_TW, got_TW) in enumerate(zip(truths, got, strict=True)):
        truth_TW, got_TW = truth_TW.cpu(), got_TW.cpu()
        eager_TW = worst_of([run[index].cpu() for run in runs[: len(baseline.eager)]], truth_TW)
        if got_TW.shape != truth_TW.shape or got_TW.dtype != eager_TW.dtype:
            result.failures.append(
                f"text {index}: hidden vectors are {list(got_TW.shape)} of {got_TW.dtype}, "
                f"the reference's {list(truth_TW.shape)} of {eager_TW.dtype}"
            )
            continue
        scale_T1 = truth_TW.abs().amax(-1, keepdim=True)
        verdict = judge_rows(WHOLE_MODEL, "R W", got_TW, eager_TW, truth_TW, scale_T1)
        result.rows += len(truth_TW)
        if verdict.failed:
            result.failures.append("\n  ".join([f"text {index}: {verdict.complaint}", *verdict.details]))
        else:
            result.largest_ratio = max(result.largest_ratio, verdict.ratio)
            if not is_judged(baseline.eager[0].compute):
                continue
            eager_NTW = torch.stack([run[index].cpu().double() for run in runs]) - truth_TW
            floor_T = torch.finfo(got_TW.dtype).eps * scale_T1[:, 0]
            of_text = leaning(
                baseline.truth,
                tokens[index],
                range(len(truth_TW)),
                got_TW.double() - truth_TW,
                eager_NTW,
                floor_T,
                type_T=None if kinds is None else kinds[index],
                encoded=True,
            )
            result.leaning = of_text if result.leaning is None else result.leaning + of_text
    check_leaning(result, baseline.eager[0].compute)
    return result


def assert_encodings_agree(
    baseline: Baseline, candidate: Encoder, texts: Texts, types: Texts | None = None
) -> PathComparison:
    """`compare_encodings`, raising `PathMismatch` with all failures and the texts where it does not hold."""
    comparison = compare_encodings(baseline, candidate, texts, types)
    if not comparison.holds:
        raise PathMismatch("\n".join([*comparison.failures, f"texts = {texts!r}, types = {types!r}"]))
    return comparison
