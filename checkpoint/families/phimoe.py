"""Phi 3.5 MoE: layer norms, biases throughout attention, and 2 of 16 experts by SparseMixer."""

from ...spec.config import MlpConfig
from ...spec.errors import ConfigError
from ...spec.moe import MoeConfig, RouterConfig, Score
from ..family import Family, ParsedConfig, layer_norm
from ..fields import Fields
from ..llama_like import INPUT_NORMS, SPLIT_QKV, read, table
from ..moe_fields import GATE, ROUTER_TRAINING, UP
from ..table import STACKED_EXPERTS, experts, linear


def _name_factor(config: Fields) -> None:
    """Give the attention factor, which these files write once for short and once for long texts, its usual name."""
    for section in ("rope_scaling", "rope_parameters"):
        scaling = config.values.get(section)
        if not isinstance(scaling, dict) or not {"short_mscale", "long_mscale"} & scaling.keys():
            continue
        short, long = scaling.get("short_mscale"), scaling.get("long_mscale")
        if short != long:
            raise config.wrong(section, "with long_mscale equal to short_mscale, since one model has one factor")
        rest = {name: value for name, value in scaling.items() if name not in ("short_mscale", "long_mscale")}
        config.values = {**config.values, section: {**rest, "attention_factor": short}}


def _read(config: Fields) -> ParsedConfig:
    _name_factor(config)
    jitter = config.number("router_jitter_noise", 0.01)
    top_k = config.integer("num_experts_per_tok", 2)
    if top_k != 2:
        raise ConfigError(f"{config.where}num_experts_per_tok is {top_k}; with SparseMixer it must be 2")
    chooses = RouterConfig(
        experts=config.integer("num_local_experts", 16), top_k=top_k, score=Score.SPARSEMIXER, nearness=2 * jitter
    )
    bias = config.flag("attention_bias", False)

    def feed(index: int, plain: MlpConfig) -> MoeConfig:
        return MoeConfig(router=chooses, expert=plain)

    return read(
        config,
        norm=layer_norm(config, "rms_norm_eps"),
        base=1e6,
        windows=config.optional_integer("sliding_window", None),
        attention={"qkv_bias": bias, "output_bias": bias},
        feed=feed,
        model={"head_bias": config.flag("lm_head_bias", False)},
    )


PHIMOE = Family(
    model_type="phimoe",
    architectures=("PhimoeForCausalLM", "PhimoeModel", "PhiMoEForCausalLM"),
    read=_read,
    table=table(
        *INPUT_NORMS,
        *SPLIT_QKV,
        *linear("self_attn.o_proj", "attention.output"),
        *linear("block_sparse_moe.gate", "mlp.router"),
        *linear("mlp.router", "mlp.router"),
        *experts("block_sparse_moe.experts.{expert}.w1", GATE),
        *experts("block_sparse_moe.experts.{expert}.w3", UP),
        *experts("block_sparse_moe.experts.{expert}.w2", "mlp.experts.down"),
        *STACKED_EXPERTS,
    ),
    ignored={
        **{name: why for name, why in ROUTER_TRAINING.items() if name != "router_jitter_noise"},
        "input_jitter_noise": "training: noise on what the experts read",
        "original_max_position_embeddings": "read with the rotary fields that it belongs to, LongRoPE's",
    },
    remote_code=("configuration_phimoe", "modeling_phimoe"),
)
