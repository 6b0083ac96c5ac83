"""Phi 1, 1.5 and 2: layer norms, attention and a plain MLP in parallel behind one of them, rotation of a part of each
head, biases everywhere, the head's included."""

from dataclasses import replace

from ...spec.config import Residual
from ..family import Family, ParsedConfig, layer_norm
from ..fields import Fields
from ..llama_like import SPLIT_QKV, read, table
from ..table import Heads, linear, norm, output

TABLE = replace(
    table(
        *norm("input_layernorm", "attention_norm"),
        *SPLIT_QKV,
        *linear("self_attn.dense", "attention.output"),
        *norm("self_attn.q_layernorm", "attention.query_norm", Heads.SHARED),
        *norm("self_attn.k_layernorm", "attention.key_norm", Heads.SHARED),
        *linear("mlp.fc1", "mlp.up"),
        *linear("mlp.fc2", "mlp.down"),
    ),
    head=(*norm("final_layernorm", "norm"), *output("lm_head")),
)


def _read(config: Fields) -> ParsedConfig:
    norm = layer_norm(config, "layer_norm_eps")
    qk_norm = norm if config.flag("qk_layernorm", False) else None
    return read(
        config,
        norm=norm,
        usual_activation="gelu_new",
        gated=False,
        mlp_bias=True,
        part=0.5,
        attention={"qkv_bias": True, "output_bias": True, "qk_norm": qk_norm},
        layer={"residual": Residual.PARALLEL_SHARED_NORM},
        model={"head_bias": True},
    )


PHI = Family(
    model_type="phi",
    architectures=("PhiForCausalLM", "PhiModel"),
    read=_read,
    table=TABLE,
    remote_code=("configuration_phi", "modeling_phi"),
)
