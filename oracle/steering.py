"""Truth and eager baseline forced, call by call, to the experts that a candidate reports; see `routes`.

Shapes: T_i new tokens of sequence i, E experts, K chosen, N eager runs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..reference.path import ReferencePath
from ..reference.routing import route
from ..spec.decoder import Routes
from ..spec.moe import Score
from .routes import Forced, RouteTie, allowed_scores, judge_choice, logit_errors, nearest_call, on_an_edge, ranking


@dataclass(frozen=True, slots=True)
class Calls:
    """What the routers of a step were asked, and what came of it."""

    ties: list[RouteTie]
    """Of a path that reports: choices that are not the truth's, admissible or not, in the order of the layers."""
    cut: dict[int, RouteTie]
    """For each sequence the first token from which its rows cannot be judged."""
    choices: dict[int, list[Tensor]]
    """For each sequence that got tokens, what was chosen in each layer with experts."""


class Steering:
    """Holds the reference's routers, of the truth and of each eager run, and turns them."""

    def __init__(self, truth: ReferencePath, eager: Sequence[ReferencePath]) -> None:
        self.layers = truth.config.mixtures
        """The mixtures, by the index of their layer."""
        self._forced = [Forced() for _ in (truth, *eager)]
        steered = [
            path.with_components(replace(path.components, route=forced))
            for path, forced in zip((truth, *eager), self._forced, strict=True)
        ]
        self.truth, self.eager = steered[0], steered[1:]

    def begin(self, reported: Routes | None) -> None:
        """Have the truth follow what is reported, or itself."""
        self._forced[0].force([] if reported is None else [each for layers in reported for each in layers if len(each)])

    def follow(self) -> None:
        """Have the eager runs follow what the truth did."""
        for forced in self._forced[1:]:
            forced.force([call[3] for call in self._forced[0].calls])

    def misfit(self, routes: Routes, lengths: Sequence[int]) -> str | None:
        """Return what is wrong with the form of reported choices."""
        if len(routes) != len(lengths) or any(len(layers) != len(self.layers) for layers in routes):
            return f"routes must hold, for each of {len(lengths)} sequences, {len(self.layers)} tensors"
        for sequence, (length, layers) in enumerate(zip(lengths, routes, strict=True)):
            for (layer, config), chosen_TK in zip(self.layers.items(), layers, strict=True):
                where, experts = f"sequence {sequence}, layer {layer}: routes", config.router.experts
                if chosen_TK.shape != (length, config.router.top_k) or chosen_TK.dtype is not torch.int64:
                    shape = list(chosen_TK.shape)
                    return f"{where} are {shape} of {chosen_TK.dtype}, not {[length, config.router.top_k]} of int64"
                for chosen in chosen_TK.tolist():
                    if len(set(chosen)) < len(chosen) or not all(0 <= each < experts for each in chosen):
                        return f"{where} name experts {chosen}; they must differ and lie in 0 .. {experts - 1}"
        return None

    def judged(self, step: int, first: Sequence[int], lengths: Sequence[int], reports: bool) -> Calls:
        """Judge the calls of a step, after all paths were extended; the first new tokens are at positions `first`."""
        calls = Calls([], {}, {})
        places = [(sequence, layer) for sequence, length in enumerate(lengths) if length for layer in self.layers]
        for number, (sequence, layer) in enumerate(places):
            calls.choices.setdefault(sequence, []).append(self._forced[0].calls[number][3].cpu())
            for tie, decided in self._tokens(number, reports):
                at = replace(tie, step=step, sequence=sequence, position=first[sequence] + tie.position, layer=layer)
                if decided:
                    calls.ties.append(at)
                elif sequence not in calls.cut or at.position < calls.cut[sequence].position:
                    calls.cut[sequence] = at
        return calls

    def _tokens(self, number: int, reports: bool) -> Iterator[tuple[RouteTie, bool]]:
        """Yield each token that is not as the truth has it, and whether the candidate said how it decided."""
        logit_TE, config, bias_E, chosen_TK = self._forced[0].calls[number]
        logit_TE, chosen_TK = logit_TE.cpu(), chosen_TK.cpu()
        bias_E = None if bias_E is None else bias_E.cpu()
        eager_NTE = torch.stack([forced.calls[number][0].cpu() for forced in self._forced[1:]])
        error_T = logit_errors(logit_TE, eager_NTE, logit_TE.abs().amax(-1))
        score_TE = ranking(logit_TE, config, bias_E)
        allowed_TE = allowed_scores(logit_TE, error_T, config, bias_E)
        own = route(logit_TE, config, bias_E).expert_TK.tolist()
        for token, (best, chosen) in enumerate(zip(own, chosen_TK.tolist(), strict=True)):
            of_token = (score_TE[token], allowed_TE[token], config)
            same = best == chosen if config.score is Score.SPARSEMIXER else set(best) == set(chosen)
            if reports and not same:
                judged = judge_choice(chosen, *of_token)
                yield RouteTie(0, 0, token, 0, tuple(chosen), tuple(best), judged.gap, judged.allowed), True
            if not reports:
                judged = nearest_call(*of_token, best)
                tie = RouteTie(0, 0, token, 0, None, tuple(best), judged.gap, judged.allowed)
                if tie.admissible:
                    yield tie, False
                    continue
            if on_an_edge(logit_TE[token], float(error_T[token]), chosen, config):
                yield RouteTie(0, 0, token, 0, None, tuple(best), 0.0, float(error_T[token])), False
