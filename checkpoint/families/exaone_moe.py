"""K-EXAONE: Qwen 3's attention, where only layers with a window rotate, and GLM 4.5's experts.

Published files hold one layer more, which guesses tokens further ahead, under names of its own.
"""

from dataclasses import replace

from ...spec.config import MlpConfig
from ...spec.moe import MoeConfig, RouterConfig, Score
from ..family import Family, ParsedConfig, alias, rms_norm
from ..fields import Fields
from ..llama_like import all_but_every, layer_count, layer_types, read, rotation_of, sparse_layers, windows
from ..moe_fields import ROUTER_TRAINING
from ..table import Ignorable, tensor
from . import glm4_moe


def _read(config: Fields) -> ParsedConfig:
    config.only("scoring_func", "sigmoid", None)
    config.only("topk_method", "noaux_tc", None)
    chooses = RouterConfig(
        experts=config.integer("num_experts", 64),
        top_k=config.integer("num_experts_per_tok", 8),
        score=Score.SIGMOID,
        renormalize=config.flag("norm_topk_prob", True),
        scale=config.number("routed_scaling_factor", 2.5),
        choice_bias=True,
        groups=config.integer("n_group", 1),
        kept_groups=config.integer("topk_group", 1),
    )
    first = config.integer(alias(config, "first_k_dense_replace", "first_last_k_dense_replace"), 1, least=0)
    sparse = sparse_layers(config, first)
    config.only("is_moe_layer", None, sparse)
    width, shared = config.integer("moe_intermediate_size", 1024), config.integer("num_shared_experts", 1)
    own_norm, window = rms_norm(config, default=1e-5), config.optional_integer("sliding_window", 4096)
    local, rotation = _local(config), rotation_of(config)

    def feed(index: int, plain: MlpConfig) -> MlpConfig | MoeConfig:
        if not sparse[index]:
            return plain
        expert = replace(plain, width=width)
        return MoeConfig(router=chooses, expert=expert, shared=replace(plain, width=width * shared))

    return read(
        config,
        norm=own_norm,
        windows=windows(config, local, window),
        rotations=[rotation if here or window is None else None for here in local],
        attention={"qk_norm": own_norm},
        feed=feed,
    )


def _local(config: Fields) -> list[bool]:
    """Return which layers have the window; a pattern of letters only repeats what `layer_types` says."""
    layers = layer_count(config)
    if config.has("layer_types"):
        config.ignore(("sliding_window_pattern",))
        return layer_types(config, [False] * layers)
    pattern = config.optional_integer("sliding_window_pattern", 4)
    return layer_types(config, [False] * layers if pattern is None else all_but_every(pattern, layers))


EXAONE_MOE = Family(
    model_type="exaone_moe",
    architectures=("ExaoneMoeForCausalLM", "ExaoneMoEForCausalLM", "ExaoneMoeModel"),
    read=_read,
    table=replace(
        glm4_moe.TABLE,
        layer=(tensor("mlp.e_score_correction_bias", "mlp.choice_bias_E"), *glm4_moe.TABLE.layer),
        ignorable=(*glm4_moe.TABLE.ignorable, Ignorable(name="mtp.*", why="guesses tokens further ahead")),
    ),
    ignored={
        **ROUTER_TRAINING,
        "num_nextn_predict_layers": "layers that guess tokens further ahead, whose tensors are left out",
    },
)
