"""`twinfer inspect`: a model's config, and its parameters and bytes by component."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from twinfer.spec.config import Head, LayerConfig, MlpConfig, ModelConfig, NormPlacement, Residual, Storage
from twinfer.spec.counts import Count, cache_bytes_per_token, count, total
from twinfer.spec.errors import CheckpointError
from twinfer.spec.moe import MoeConfig
from twinfer.spec.paper_models import PAPER_MODELS

from .console import print_json, print_table, waiting
from .options import MODEL_HELP, add_json

NAME, HELP = "inspect", "a model's config, parameters and bytes"
DESCRIPTION = "Show a model's config, and its parameters and bytes by component. No weights are read."
EPILOG = f"""\
the paper's models, known by config alone:
  {"  ".join(PAPER_MODELS)}

with --json, one object: {{"model", "config", "layers": [{{"indices", "config"}}],
  "components": {{name: {{"parameters", "bytes": {{storage: bytes}}}}}}, "total": {{"parameters", "bytes"}},
  "cache_bytes_per_token"}}
  layers that are alike are listed once; bytes are those of the weights in each storage, scales included;
  cache_bytes_per_token is what one token takes in a float32 key/value cache
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}, or a model of the paper, listed below")
    add_json(parser)


PLACEMENTS = {
    NormPlacement.PRE_NORM: "",
    NormPlacement.OUTPUT_NORM: " after attention and MLP",
    NormPlacement.SANDWICH_NORM: " before and after attention and MLP",
    NormPlacement.POST_NORM: " of the sums",
    NormPlacement.STREAM_NORM: " of the stream itself",
}
HEADS = {Head.TIED: "tied head", Head.UNTIED: "head of its own", Head.NONE: "no head"}


def run(args: argparse.Namespace) -> int:
    config = config_of(args.model)
    if args.json:
        print_json(_report(args.model, config))
        return 0
    print(f"{args.model}: {describe_model(config)}")
    for layer, indices in distinct_layers(config).items():
        print(f"{_ranges(indices)}: {describe_layer(layer)}")
    print_table(_table(config))
    print(f"key/value cache: {cache_bytes_per_token(config):,} bytes a token of each sequence, in float32")
    return 0


def distinct_layers(config: ModelConfig) -> dict[LayerConfig, list[int]]:
    """Each different layer, with the indices at which it stands."""
    indices: dict[LayerConfig, list[int]] = {}
    for index, layer in enumerate(config.layers):
        indices.setdefault(layer, []).append(index)
    return indices


def describe_model(config: ModelConfig) -> str:
    return ", ".join(
        [
            f"family {config.family}",
            f"hidden {config.hidden}",
            f"vocabulary {config.vocabulary}",
            f"context {config.context}",
            f"{len(config.layers)} layers",
            "learned positions" if config.learned_positions else "no learned positions",
            *_embedding_words(config),
            HEADS[config.head],
            *_head_words(config),
        ]
    )


def _embedding_words(config: ModelConfig) -> list[str]:
    words = []
    if config.embedding_size is not None:
        words.append(f"token table of width {config.embedding_size}")
    if config.embedding_scale != 1:
        words.append(f"embeddings times {config.embedding_scale:g}")
    if config.embedding_norm is not None:
        words.append(f"{config.embedding_norm.kind} norm of embeddings")
    if config.token_types:
        words.append(f"{config.token_types} token types")
    return words


def _head_words(config: ModelConfig) -> list[str]:
    words = ["with bias"] if config.head_bias else []
    if config.logit_scale != 1:
        words.append(f"logits times {config.logit_scale:g}")
    if config.logit_softcap is not None:
        words.append(f"logits capped at {config.logit_softcap:g}")
    return words


def describe_layer(layer: LayerConfig) -> str:
    attention, mlp = layer.attention, layer.mlp
    words = [
        f"{layer.norm.kind} norm{PLACEMENTS[layer.norm_placement]}",
        f"{attention.heads} heads of {attention.head_size}",
    ]
    if attention.kv_heads != attention.heads:
        words.append(f"{attention.kv_heads} key/value heads")
    if attention.rotary is not None:
        words.append(f"rotary positions on {attention.rotary.size} elements, {attention.rotary.layout}")
    if not attention.causal:
        words.append("sees later tokens")
    if attention.alibi:
        words.append("ALiBi")
    if attention.qk_norm is not None:
        words.append(f"{attention.qk_norm.kind} norm of queries and keys")
    if attention.softcap is not None:
        words.append(f"scores capped at {attention.softcap:g}")
    if attention.qkv_clip is not None:
        words.append(f"queries, keys and values clipped at {attention.qkv_clip:g}")
    if attention.window is not None:
        words.append(f"window {attention.window}")
    if layer.residual is not Residual.SEQUENTIAL:
        words.append("attention beside MLP")
    if attention.sinks:
        words.append("sinks")
    words += _describe_mixture(mlp) if isinstance(mlp, MoeConfig) else [_describe_mlp(mlp)]
    return ", ".join(words)


def _describe_mixture(config: MoeConfig) -> list[str]:
    router = config.router
    each = _describe_mlp(config.expert)
    words = [f"{router.experts} experts, each a {each}", f"top-{router.top_k} by {router.score}"]
    if router.renormalize:
        words.append("renormalized")
    if router.groups > 1:
        words.append(f"{router.kept_groups} of {router.groups} groups")
    if config.shared is not None:
        words.append(f"beside a shared {_describe_mlp(config.shared)}")
    if config.residual is not None:
        words.append(f"mixed with a {_describe_mlp(config.residual)}")
    return words


def _describe_mlp(config: MlpConfig) -> str:
    return f"{'gated ' if config.gated else ''}{config.activation} MLP of {config.width}"


def config_of(model: str) -> ModelConfig:
    """Return the config of a model of the paper, by its name, or of any that `open_model` takes.

    Where there is no such model, the error lists those of the paper too.
    """
    if model in PAPER_MODELS:
        return PAPER_MODELS[model].config
    from twinfer.checkpoint import open_model

    try:
        with waiting() as report:
            return open_model(model, report=report).config
    except CheckpointError as error:
        if Path(model).exists():
            raise
        raise CheckpointError(f"{error}; by config alone, also {', '.join(PAPER_MODELS)}") from None


def _report(model: str, config: ModelConfig) -> dict[str, Any]:
    whole = asdict(config)
    del whole["layers"]
    return {
        "model": model,
        "config": whole,
        "layers": [{"indices": indices, "config": asdict(layer)} for layer, indices in distinct_layers(config).items()],
        "components": {component.value: _sizes(part) for component, part in count(config).items()},
        "total": _sizes(total(config)),
        "cache_bytes_per_token": cache_bytes_per_token(config),
    }


def _sizes(part: Count) -> dict[str, Any]:
    return {"parameters": part.parameters, "bytes": {storage.value: part.bytes(storage) for storage in Storage}}


def _table(config: ModelConfig) -> Table:
    table = Table("component", *(f"{name}" for name in ("parameters", "share", *(f"{s} MB" for s in Storage))))
    for column in table.columns[1:]:
        column.justify = "right"
    everything = total(config)
    for component, part in count(config).items():
        if part.parameters:
            table.add_row(component.value, *_cells(part, everything))
    table.add_section()
    table.add_row("total", *_cells(everything, everything))
    return table


def _cells(part: Count, everything: Count) -> list[str]:
    megabytes = [f"{part.bytes(storage) / 1e6:,.1f}" for storage in Storage]
    return [f"{part.parameters:,}", f"{part.parameters / everything.parameters:.1%}", *megabytes]


def _ranges(indices: list[int]) -> str:
    """Name layers in words.

    >>> _ranges([0, 1, 2, 3]), _ranges([1, 3, 5, 7]), _ranges([4])
    ('layers 0 to 3', 'layers 1, 3 ... 7', 'layer 4')
    """
    if len(indices) == 1:
        return f"layer {indices[0]}"
    if indices == list(range(indices[0], indices[-1] + 1)):
        return f"layers {indices[0]} to {indices[-1]}"
    if len(indices) > 3:
        return f"layers {indices[0]}, {indices[1]} ... {indices[-1]}"
    return f"layers {', '.join(map(str, indices))}"
