"""Mellum 2: Qwen 3's attention and experts; layers with a window rotate by a section of their own."""

from dataclasses import replace

from ...spec.config import MlpConfig
from ...spec.moe import MoeConfig
from ..family import Family, ParsedConfig, rms_norm
from ..fields import Fields
from ..llama_like import layer_count, layer_types, read, rotating, sparse_layers, windows
from ..moe_fields import ROUTER_TRAINING
from ..rotary_fields import rotations
from ..table import Ignorable
from . import qwen3_moe
from .qwen2_moe import chosen_by

_REQUIRED = {"use_sliding_window": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
"""Fields of Qwen 3, each with the one value that `layer_types` and `mlp_layer_types` leave it."""


def _read(config: Fields) -> ParsedConfig:
    for name, computed in _REQUIRED.items():
        config.only(name, computed, None)
    chooses = chosen_by(config, experts=64, top_k=8, renormalize=True)
    sparse, width = sparse_layers(config, 0), config.integer("moe_intermediate_size", 896)
    local = layer_types(config, [False] * layer_count(config))
    turns = rotations(config, rotating(config, 128, base=500000.0), local_base=10000.0)
    bias = config.flag("attention_bias", False)

    def feed(index: int, plain: MlpConfig) -> MlpConfig | MoeConfig:
        return MoeConfig(router=chooses, expert=replace(plain, width=width)) if sparse[index] else plain

    return read(
        config,
        windows=windows(config, local, config.optional_integer("sliding_window", 1024)),
        rotations=[turns["sliding_attention" if here else "full_attention"] for here in local],
        size=128,
        attention={"qkv_bias": bias, "output_bias": bias, "qk_norm": rms_norm(config)},
        feed=feed,
    )


MELLUM = Family(
    model_type="mellum",
    architectures=("MellumForCausalLM", "MellumModel"),
    read=_read,
    table=replace(
        qwen3_moe.QWEN3_MOE.table,
        ignorable=(
            *qwen3_moe.QWEN3_MOE.table.ignorable,
            Ignorable(name="mtp.*", why="guesses tokens further ahead"),
        ),
    ),
    ignored={
        **ROUTER_TRAINING,
        "max_window_layers": "of Qwen 2, from whose files it was taken over",
        **dict.fromkeys(
            ("num_mtp_layers", "num_nextn_predict_layers", "mtp_layer_types", "mtp_mlp_layer_types"),
            "layers that guess tokens further ahead, whose tensors are left out",
        ),
    },
)
