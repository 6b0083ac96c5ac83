"""Counts which conventions, sizes and degrees drawn tests of many ranks reach."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace

from twinfer.spec.config import LayerConfig, ModelConfig, NormPlacement, QkNormSpan, Residual, RotaryConfig, Storage
from twinfer.spec.mlp import MlpConfig
from twinfer.spec.moe import ROUTERS, MoeConfig, RouterConfig
from twinfer.spec.parallel import ParallelConfig

Kind = tuple[str, str]

REACHED: dict[str, Counter[Kind]] = defaultdict(Counter)
"""What cases of this run have reached, by the name of their test."""

FORMS = {
    *(("residual", f"pre-norm, {form.value}") for form in Residual),
    *(("residual", place.value) for place in NormPlacement if place is not NormPlacement.PRE_NORM),
}
CONVENTIONS: set[Kind] = FORMS | {
    *(("bias", name) for name in ("query, key, value", "attention's output", "MLP", "head")),
    *(("norm of queries and keys", span.value) for span in QkNormSpan),
    *(("positions", name) for name in ("learned", "rotary", "ALiBi")),
    *(("head", name) for name in ("tied", "untied", "narrower than the hidden size")),
    ("MLP", "gated"),
    ("MLP", "plain"),
}
SIZES: set[Kind] = {
    ("size", "a vocabulary that the tensor ranks do not divide"),
    ("size", "layers that the stages do not divide"),
    ("size", "key/value heads that ranks share"),
    ("size", "key/value heads that ranks replicate"),
}


def recipe_of(router: RouterConfig) -> str:
    """Return the names of the published recipes that it is, sizes aside."""
    small = replace(router, experts=2, top_k=1, groups=1, kept_groups=1, scale=1.0)
    return ", ".join(name for name, each in ROUTERS.items() if replace(each, top_k=1) == small)


RECIPES: set[Kind] = {
    *(("router", recipe_of(each)) for each in ROUTERS.values()),
    *(("beside the experts", name) for name in ("nothing", "shared", "shared, gated", "residual")),
    ("router", "more experts than one a token"),
    ("router", "groups of experts"),
    ("bias", "experts"),
}


def kinds_of(config: ModelConfig, parallel: ParallelConfig, storage: Storage) -> set[Kind]:
    """Return what a model at some degrees is an example of."""
    found: set[Kind] = {("storage", storage.value), *_degrees(parallel), *_sizes(config, parallel)}
    for layer in config.layers:
        found |= {*_of_layer(layer)}
    ends = {
        ("bias", "head"): config.head_bias,
        ("positions", "learned"): config.learned_positions,
        ("head", config.head.value): True,
        ("head", "narrower than the hidden size"): config.embedding_size is not None,
    }
    return found | {kind for kind, holds in ends.items() if holds}


def _degrees(parallel: ParallelConfig) -> Iterator[Kind]:
    for name in ("data", "pipeline", "tensor", "expert", "expert_slices"):
        if getattr(parallel, name) > 1:
            yield "degree", f"{name.replace('_', ' ')} {getattr(parallel, name)}"
    if parallel.expert > 1:
        yield "exchange", parallel.exchange.value
    if parallel.expert * parallel.expert_slices > 1 and parallel.stage_ranks > parallel.expert * parallel.expert_slices:
        yield "exchange", "experts in replicas"
    above = [each for each in (parallel.data, parallel.pipeline, parallel.tensor) if each > 1]
    if len(above) > 1 and len(set(above)) == len(above):
        yield "degree", "several, that differ from one another"


def _sizes(config: ModelConfig, parallel: ParallelConfig) -> Iterator[Kind]:
    if config.vocabulary % parallel.tensor:
        yield "size", "a vocabulary that the tensor ranks do not divide"
    if len(config.layers) % parallel.pipeline:
        yield "size", "layers that the stages do not divide"
    if parallel.tensor > 1:
        for layer in config.layers:
            replicated = layer.attention.kv_heads < parallel.tensor
            yield "size", f"key/value heads that ranks {'replicate' if replicated else 'share'}"


def _of_layer(layer: LayerConfig) -> Iterator[Kind]:
    pre = layer.norm_placement is NormPlacement.PRE_NORM
    yield "residual", f"pre-norm, {layer.residual.value}" if pre else layer.norm_placement.value
    attention, mlp = layer.attention, layer.mlp
    inner = mlp if isinstance(mlp, MlpConfig) else mlp.expert
    holds = {
        ("bias", "query, key, value"): attention.qkv_bias,
        ("bias", "attention's output"): attention.output_bias,
        ("bias", "MLP" if inner is mlp else "experts"): inner.bias,
        ("MLP", "gated" if inner.gated else "plain"): True,
        ("norm of queries and keys", attention.qk_norm_span.value): attention.qk_norm is not None,
        ("positions", "rotary"): isinstance(attention.rotary, RotaryConfig),
        ("positions", "ALiBi"): attention.alibi,
    }
    yield from (kind for kind, held in holds.items() if held)
    if isinstance(mlp, MoeConfig):
        yield "router", recipe_of(mlp.router)
        if mlp.router.top_k > 1:
            yield "router", "more experts than one a token"
        if mlp.router.groups > 1:
            yield "router", "groups of experts"
        shared = "shared, gated" if mlp.shared_gate else "shared"
        yield "beside the experts", "residual" if mlp.residual else shared if mlp.shared else "nothing"


def note(test: str, config: ModelConfig, parallel: ParallelConfig, storage: Storage) -> None:
    """Count a case of a test."""
    REACHED[test].update(kinds_of(config, parallel, storage))


def print_reached() -> None:
    """Print how many cases reached each kind, a line for each group, and forget it."""
    for test, reached in REACHED.items():
        groups: dict[str, list[str]] = {}
        for (group, kind), count in sorted(reached.items()):
            groups.setdefault(group, []).append(f"{kind}: {count}")
        print(f"\n{test}:")
        print("\n".join(f"| {group} | {'; '.join(kinds)} |" for group, kinds in groups.items()))
    REACHED.clear()
