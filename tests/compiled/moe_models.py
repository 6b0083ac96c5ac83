"""Small drawn models whose layers hold mixtures of experts of every recipe, beside dense layers."""

from dataclasses import replace

from twinfer.oracle.case import Picker
from twinfer.oracle.models import draw_model_config
from twinfer.spec.config import Activation, LayerConfig, MlpConfig, ModelConfig
from twinfer.spec.moe import MoeConfig, RouterConfig, Score


def draw_moe_config(pick: Picker, *, context: int = 40) -> ModelConfig:
    """A decoder of one to three layers, at least one of which is a mixture; sinks and clamps among them."""
    config = draw_model_config(pick, context=context)
    mixture = pick.integer(0, len(config.layers) - 1)

    def layer(index: int, dense: LayerConfig) -> LayerConfig:
        mlp = draw_moe(pick) if index == mixture or pick.choice([True, False]) else draw_mlp(pick)
        return replace(dense, mlp=mlp, attention=replace(dense.attention, sinks=pick.choice([False, True])))

    return replace(config, layers=tuple(layer(index, each) for index, each in enumerate(config.layers)))


def draw_moe(pick: Picker) -> MoeConfig:
    """Alone, beside a shared MLP with or without a gate, or mixed with a residual MLP."""
    beside = pick.choice(["nothing", "shared", "gated", "residual"])
    return MoeConfig(
        router=draw_router(pick),
        expert=draw_mlp(pick),
        shared=draw_mlp(pick) if beside in ("shared", "gated") else None,
        shared_gate=beside == "gated",
        residual=draw_mlp(pick) if beside == "residual" else None,
    )


def draw_router(pick: Picker) -> RouterConfig:
    groups, size = pick.choice([1, 1, 2, 3]), pick.integer(1, 4)
    kept, score = pick.integer(1, groups), pick.choice(list(Score))
    return RouterConfig(
        experts=groups * size,
        top_k=pick.integer(1, size * kept),
        score=score,
        renormalize=pick.choice([False, True]),
        scale=pick.choice([1.0, 2.5]),
        logit_bias=pick.choice([False, True]),
        choice_bias=score in (Score.SOFTMAX, Score.SIGMOID) and pick.choice([False, True]),
        nearness=0.02 if score is Score.SPARSEMIXER else None,
        groups=groups,
        kept_groups=kept,
    )


def draw_mlp(pick: Picker) -> MlpConfig:
    """Of widths that fill blocks of 8 and 16 outputs, and that do not."""
    gated = pick.choice([False, True])
    return MlpConfig(
        width=pick.choice([8, 5, 16, 24, 40]),
        activation=pick.choice(list(Activation)),
        gated=gated,
        bias=pick.choice([False, True]),
        clamp=pick.choice([None, 1.0]) if gated else None,
        up_offset=pick.choice([0.0, 1.0]) if gated else 0.0,
    )
