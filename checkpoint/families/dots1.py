"""dots.llm1: Qwen 3's attention, and GLM 4.5's experts."""

from dataclasses import replace

from ...spec.config import MlpConfig
from ...spec.moe import MoeConfig, RouterConfig, Score
from ..family import Family, ParsedConfig, rms_norm
from ..fields import Fields
from ..llama_like import layer_count, layer_types, read, windows
from ..moe_fields import ROUTER_TRAINING
from .glm4_moe import TABLE


def _read(config: Fields) -> ParsedConfig:
    for name, computed in (("scoring_func", ("sigmoid", "noaux_tc", None)), ("topk_method", ("noaux_tc", None))):
        config.only(name, *computed)
    config.only("moe_layer_freq", 1, None)
    chooses = RouterConfig(
        experts=config.integer("n_routed_experts"),
        top_k=config.integer("num_experts_per_tok"),
        score=Score.SIGMOID,
        renormalize=config.flag("norm_topk_prob", False),
        scale=config.number("routed_scaling_factor", 1.0),
        choice_bias=True,
        groups=config.integer("n_group", 1),
        kept_groups=config.integer("topk_group", 1),
    )
    first = config.integer("first_k_dense_replace", 0, least=0)
    width, shared = config.integer("moe_intermediate_size", 1408), config.integer("n_shared_experts")
    window, layers = config.optional_integer("sliding_window", 4096), layer_count(config)
    windowed = config.integer("max_window_layers", 62, least=0)
    here = layer_types(config, [window is not None and index >= windowed for index in range(layers)])
    bias = config.flag("attention_bias", False)

    def feed(index: int, plain: MlpConfig) -> MlpConfig | MoeConfig:
        if index < first:
            return plain
        return MoeConfig(
            router=chooses, expert=replace(plain, width=width), shared=replace(plain, width=width * shared)
        )

    return read(
        config,
        windows=windows(config, here, window),
        attention={"qkv_bias": bias, "output_bias": bias, "qk_norm": rms_norm(config)},
        feed=feed,
    )


DOTS1 = Family(
    model_type="dots1",
    architectures=("Dots1ForCausalLM", "Dots1Model"),
    read=_read,
    table=TABLE,
    ignored=ROUTER_TRAINING,
)
