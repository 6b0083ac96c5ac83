"""gpt-oss: attention sinks, every other layer with a window, and experts with biases and a clamped activation.

Its experts' gate and up are kept transposed, row by row in turns. The files as first published hold them in MXFP4,
which is refused by its config: convert the model to bfloat16 with transformers first.
"""

from dataclasses import replace

from ...spec.config import Activation, MlpConfig
from ...spec.errors import ConfigError
from ...spec.moe import MoeConfig, router
from ..family import Family, ParsedConfig, rms_norm
from ..fields import Fields
from ..llama_like import INPUT_NORMS, SPLIT_QKV, all_but_every, layer_count, layer_types, read, table, windows
from ..moe_fields import ROUTER_TRAINING
from ..table import GATE_UP, Experts, experts, linear, tensor


def _read(config: Fields) -> ParsedConfig:
    _refuse_packed(config)
    config.only("swiglu_alpha", 1.702)
    limit = config.number("swiglu_limit", 7.0)
    chooses = router(
        "gpt-oss",
        experts=config.integer("num_local_experts", 128),
        top_k=config.integer("num_experts_per_tok", 4),
    )
    config.only("experts_per_token", None, chooses.top_k)
    config.only("hidden_act", "silu")  # named so, but the sigmoid has a factor
    bias = config.flag("attention_bias", True)
    every_other = all_but_every(2, layer_count(config))

    def feed(index: int, plain: MlpConfig) -> MoeConfig:
        expert = replace(plain, activation=Activation.GELU_SIGMOID, bias=True, clamp=limit, up_offset=1.0)
        return MoeConfig(router=chooses, expert=expert)

    return read(
        config,
        norm=rms_norm(config, default=1e-5),
        base=150000.0,
        size=64,
        windows=windows(config, layer_types(config, every_other), config.optional_integer("sliding_window", 128)),
        attention={"qkv_bias": bias, "output_bias": bias, "sinks": True},
        feed=feed,
    )


def _refuse_packed(config: Fields) -> None:
    packing = config.values.get("quantization_config")
    if isinstance(packing, dict) and packing.get("quant_method") == "mxfp4":
        raise ConfigError(
            f"{config.where}quantization_config says mxfp4, which cannot be read; open the model with transformers, "
            "Mxfp4Config(dequantize=True), and save it in bfloat16"
        )


GPT_OSS = Family(
    model_type="gpt_oss",
    architectures=("GptOssForCausalLM", "GptOssModel"),
    read=_read,
    table=table(
        *INPUT_NORMS,
        *SPLIT_QKV,
        *linear("self_attn.o_proj", "attention.output"),
        tensor("self_attn.sinks", "attention.sink_H"),
        *linear("mlp.router", "mlp.router"),
        *experts(
            "mlp.experts.gate_up_proj",
            *GATE_UP,
            form=Experts.STACKED,
            transposed=True,
            interleaved=True,
            endings=("", "_bias"),
        ),
        *experts(
            "mlp.experts.down_proj", "mlp.experts.down", form=Experts.STACKED, transposed=True, endings=("", "_bias")
        ),
    ),
    ignored={**ROUTER_TRAINING, "initial_context_length": "the context that YaRN starts from, read with its fields"},
)
