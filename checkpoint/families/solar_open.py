"""Solar Open: LLaMA's attention, and GLM 4.5's experts in every layer."""

from dataclasses import replace

from ...spec.config import MlpConfig
from ...spec.moe import MoeConfig
from ..family import Family, ParsedConfig, rms_norm
from ..fields import Fields
from ..llama_like import read
from ..moe_fields import ROUTER_TRAINING
from .glm4_moe import TABLE, chosen_by_sigmoid


def _read(config: Fields) -> ParsedConfig:
    config.only("first_k_dense_replace", 0, None)
    config.only("use_qk_norm", False, None)
    chooses = chosen_by_sigmoid(config)
    width, shared = config.integer("moe_intermediate_size", 1280), config.integer("n_shared_experts", 1)
    config.values = {"intermediate_size": width, **config.values}

    def feed(index: int, plain: MlpConfig) -> MoeConfig:
        return MoeConfig(
            router=chooses, expert=replace(plain, width=width), shared=replace(plain, width=width * shared)
        )

    return read(
        config,
        norm=rms_norm(config, default=1e-5),
        base=1e6,
        size=128,
        attention={"qkv_bias": config.flag("attention_bias", False)},
        feed=feed,
    )


SOLAR_OPEN = Family(
    model_type="solar_open",
    architectures=("SolarOpenForCausalLM", "SolarOpenModel"),
    read=_read,
    table=TABLE,
    ignored=ROUTER_TRAINING,
)
