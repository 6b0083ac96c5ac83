"""Phi 3, 3.5 and 4: LLaMA with merged projections, windows, rotation of a part of each head, and LongRoPE."""

from ..family import Family, ParsedConfig, rms_norm
from ..fields import Fields
from ..llama_like import INPUT_NORMS, read, table
from ..table import QKV, linear

TABLE = table(
    *INPUT_NORMS,
    *linear("self_attn.qkv_proj", *QKV),
    *linear("self_attn.o_proj", "attention.output"),
    *linear("mlp.gate_up_proj", "mlp.gate", "mlp.up"),
    *linear("mlp.down_proj", "mlp.down"),
)


def _read(config: Fields) -> ParsedConfig:
    for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
        config.only(name, False)
    for name in ("full_attn_mod", "interpolate_factor"):  # every layer with the window, positions as they are
        config.only(name, 1)
    norm = rms_norm(config, default=1e-5)
    return read(config, norm=norm, part=1.0, windows=config.optional_integer("sliding_window", None))


PHI3 = Family(
    model_type="phi3",
    architectures=("Phi3ForCausalLM", "Phi3Model"),
    read=_read,
    table=TABLE,
    ignored={"original_max_position_embeddings": "read with the rotary fields that it belongs to, LongRoPE's"},
    remote_code=("configuration_phi3", "modeling_phi3"),
)
