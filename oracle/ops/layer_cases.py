"""The cases of a layer and of its attention: every convention of `LayerConfig` drawn on its own.

Shapes: B batch, T new tokens, S tokens before them, M hidden, H query heads, K key/value heads, D head size, F
intermediate, J rotating pairs.
"""

from dataclasses import replace
from typing import Any

from ...reference.cache import KVCache
from ...spec.config import (
    Activation,
    AttentionConfig,
    Head,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    NormKind,
    NormPlacement,
    QkNormSpan,
    Residual,
    RotaryConfig,
    RotaryLayout,
)
from ...spec.moe import ROUTERS, MoeConfig, router
from ..case import DTYPES, UNMASKED, Case, Data, Inputs, Picker, activations
from ..models import RandomSource, draw_norms


def layer_cases(pick: Picker, op: str) -> Case:
    kv_heads, pairs = pick.integer(1, 2), pick.integer(0, 3)
    placement, residual = draw_norms(pick)
    causal, gated = pick.choice([True, True, False]), pick.choice([True, False])
    return Case(
        op=op,
        sizes={
            "B": pick.integer(1, 2),
            "T": pick.integer(1, 3),
            "S": pick.integer(0, 4),
            "M": pick.integer(2, 12),
            "H": kv_heads * pick.choice([1, 2, 3, 8]),
            "K": kv_heads,
            "D": 2 * max(pairs, 1) + 2 * pick.integer(0, 1),
            "F": pick.integer(1, 12),
            "J": pairs,
        },
        options={
            "norm": pick.choice([kind.value for kind in NormKind]),
            "epsilon": pick.choice([1e-5, 1e-6, 0.1]),
            "norm_bias": pick.choice([True, False]),
            "gain_from_one": pick.choice([False, True]),
            "placement": placement.value,
            "residual": residual.value,
            "residual_scale": pick.choice([1.0, 0.25]),
            "layout": pick.choice([layout.value for layout in RotaryLayout]),
            "window": pick.choice([None, 1, 2, 4]),
            "attention_factor": pick.choice([1.0, 1.25]),
            "alibi": causal and pick.choice([False, True]),
            "causal": causal,
            "softcap": pick.choice([None, 1.0]),
            "sinks": pick.choice([False, False, True]),
            "qkv_clip": pick.choice([None, 0.75]),
            "qk_norm": pick.choice([None, *(span.value for span in QkNormSpan)]),
            "kind": pick.choice([kind.value for kind in Activation]),
            "gated": gated,
            "clamp": pick.choice([None, None, 0.75]) if gated else None,
            "up_offset": pick.choice([0.0, 0.0, 1.0]) if gated else 0.0,
            "bias": pick.choice([False, True]),
            "qk_norm_rotated": pick.choice([False, True]),
            **(_drawn_mixture(pick) if op == "layer" else {}),
        },
        data=pick.choice(UNMASKED),
        dtype=pick.choice(DTYPES),
        seed=pick.integer(0, 2**31),
    )


def _drawn_mixture(pick: Picker) -> dict[str, Any]:
    """One layer in four has experts, two to six of them, in the place of its MLP."""
    experts = pick.choice([None, None, None, 2, 4, 6])
    if experts is None:
        return {"experts": None}
    return {
        "experts": experts,
        "top_k": pick.integer(1, min(3, experts)),
        "recipe": pick.choice(sorted(ROUTERS)),
        "beside": pick.choice(["nothing", "shared", "gated", "residual"]),
    }


def layer_config(case: Case) -> LayerConfig:
    options: Any = case.options
    norm = NormConfig(
        kind=NormKind(options["norm"]),
        epsilon=options["epsilon"],
        bias=options["norm_bias"],
        gain_from_one=options["gain_from_one"],
    )
    return LayerConfig(
        norm=norm,
        attention=_attention_config(case, norm),
        mlp=_mlp_config(case),
        norm_placement=NormPlacement(options["placement"]),
        residual=Residual(options["residual"]),
        residual_scale=options["residual_scale"],
    )


def _mlp_config(case: Case) -> MlpConfig | MoeConfig:
    options: Any = case.options
    mlp = MlpConfig(
        width=case.n.F,
        activation=Activation(options["kind"]),
        gated=options["gated"],
        bias=options["bias"],
        clamp=options.get("clamp"),
        up_offset=options.get("up_offset", 0.0),
    )
    if options.get("experts") is None:
        return mlp
    beside = options["beside"]
    return MoeConfig(
        router=router(options["recipe"], experts=options["experts"], top_k=options["top_k"]),
        expert=mlp,
        shared=mlp if beside in ("shared", "gated") else None,
        shared_gate=beside == "gated",
        residual=mlp if beside == "residual" else None,
    )


def _attention_config(case: Case, norm: NormConfig) -> AttentionConfig:
    """Two elements with their mean taken away are a sign times a number: no norm to test anything with."""
    n = case.n
    options: Any = case.options
    layout = RotaryLayout(options["layout"])
    head_norm = replace(norm, kind=NormKind.RMS) if n.D < 4 else norm
    return AttentionConfig(
        heads=n.H,
        kv_heads=n.K,
        head_size=n.D,
        scale=n.D**-0.5,
        window=options["window"],
        rotary=RotaryConfig(layout=layout, size=2 * n.J, attention_factor=options["attention_factor"]) if n.J else None,
        qkv_bias=options["bias"],
        output_bias=options["bias"],
        alibi=options["alibi"],
        causal=options["causal"],
        softcap=options["softcap"],
        sinks=options.get("sinks", False),
        qkv_clip=options["qkv_clip"],
        qk_norm=head_norm if options["qk_norm"] else None,
        qk_norm_span=QkNormSpan(options["qk_norm"] or "head"),
        qk_norm_rotated=options["qk_norm"] == "head" and options["qk_norm_rotated"],
    )


def model_config(config: LayerConfig, hidden: int) -> ModelConfig:
    return ModelConfig(
        family="random",
        hidden=hidden,
        vocabulary=2,
        context=64,
        layers=(config,),
        final_norm=config.norm,
        learned_positions=False,
        head=Head.TIED,
    )


def layer_inputs(case: Case) -> Inputs:
    """HUGE: the new tokens only, since keys and queries that both are leave no score to compare."""
    n, config = case.n, layer_config(case)
    old = replace(case, data=Data.NORMAL) if case.data is Data.HUGE else case
    cache = KVCache(*(activations(old, name, n.B, n.S, n.K, n.D, large=3) for name in ("old keys", "old values")))
    return {
        "x_BTM": activations(case, "x", n.B, n.T, n.M, large=5, squared=True),
        "weights": RandomSource(model_config(config, n.M), case.seed, case.dtype).layer(0),
        "config": config,
        "cache": cache,
    }


def self_attention_inputs(case: Case) -> Inputs:
    inputs = layer_inputs(replace(case, op="layer"))
    return {**inputs, "weights": inputs["weights"].attention, "config": inputs["config"].attention}
