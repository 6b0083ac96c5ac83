"""ERNIE 4.5 with experts: interleaved rotation, and experts by softmax, chosen with a bias, beside a shared MLP.

Layers from `moe_layer_start_index` to `moe_layer_end_index` have experts, if their number, from 1 on, is a multiple of
`moe_layer_interval`. Published files hold one layer more, which guesses tokens further ahead.
"""

from dataclasses import replace

from ...spec.config import MlpConfig, RotaryLayout
from ...spec.moe import MoeConfig, RouterConfig
from ..family import Family, ParsedConfig, alias, rms_norm
from ..fields import Fields
from ..llama_like import GATED_MLP, INPUT_NORMS, SPLIT_QKV, layer_count, read, rotation_of, table
from ..moe_fields import ROUTER_AND_EXPERTS, ROUTER_TRAINING
from ..table import Ignorable, Stored, linear

_BIAS = "moe_statics.e_score_correction_bias"


def _read(config: Fields) -> ParsedConfig:
    config.only("moe_norm_min", 1e-12, None)
    config.only("moe_gate", "topk", None)
    config.only("moe_use_aux_free", True, None)
    chooses = RouterConfig(
        experts=config.integer(alias(config, "moe_num_experts", "num_experts"), 64),
        top_k=config.integer(alias(config, "moe_k", "num_experts_per_tok"), 6),
        renormalize=True,
        choice_bias=True,
    )
    layers, every = layer_count(config), config.integer("moe_layer_interval", 1)
    first, last = (
        config.integer("moe_layer_start_index", 1, least=0),
        config.integer("moe_layer_end_index", -1, least=-1),
    )
    sparse = range(first, layers if last == -1 else last + 1)
    width, shared = config.integer("moe_intermediate_size", 1536), config.integer("moe_num_shared_experts", 2, least=0)
    bias = config.flag("use_bias", False)

    def feed(index: int, plain: MlpConfig) -> MlpConfig | MoeConfig:
        if index not in sparse or (index + 1) % every:
            return plain
        return MoeConfig(
            router=chooses,
            expert=replace(plain, width=width, bias=False),
            shared=replace(plain, width=width * shared) if shared else None,
        )

    return read(
        config,
        norm=rms_norm(config, default=1e-5),
        rotations=[rotation_of(config, base=500000.0, layout=RotaryLayout.INTERLEAVED)] * layers,
        mlp_bias=bias,
        tied=True,
        attention={"qkv_bias": bias, "output_bias": bias},
        feed=feed,
        model={"head_bias": bias},
    )


ERNIE4_5_MOE = Family(
    model_type="ernie4_5_moe",
    architectures=("Ernie4_5_MoeForCausalLM", "Ernie4_5_MoeModel"),
    read=_read,
    table=replace(
        table(
            *INPUT_NORMS,
            *SPLIT_QKV,
            *linear("self_attn.o_proj", "attention.output"),
            *GATED_MLP,
            *ROUTER_AND_EXPERTS,
            Stored(name=f"mlp.{_BIAS}", fills=("mlp.choice_bias_E",), one_row=True),
            Stored(name=f"mlp.gate.{_BIAS}", fills=("mlp.choice_bias_E",), one_row=True),
            *linear("mlp.shared_experts.gate_proj", "mlp.shared.gate"),
            *linear("mlp.shared_experts.up_proj", "mlp.shared.up"),
            *linear("mlp.shared_experts.down_proj", "mlp.shared.down"),
        ),
        ignorable=(Ignorable(name="mtp_*", why="guesses tokens further ahead"),),
    ),
    ignored={
        **ROUTER_TRAINING,
        "moe_capacity": "training: the tokens that an expert takes",
        "num_nextn_predict_layers": "layers that guess tokens further ahead, whose tensors are left out",
    },
)
