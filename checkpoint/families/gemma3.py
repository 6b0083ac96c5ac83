"""Gemma 3, text: Gemma 2's, scores not capped, queries and keys normalized, layers with a window of another base."""

from ...spec.config import NormPlacement
from ..family import Family, ParsedConfig, alias, rms_norm
from ..fields import Fields
from ..llama_like import GATED_MLP, SPLIT_QKV, all_but_every, layer_count, layer_types, rotating, table, windows
from ..rotary_fields import rotations
from ..table import Heads, linear, norm
from . import gemma
from .gemma2 import AROUND


def _read(config: Fields) -> ParsedConfig:
    config.only("attn_logit_softcapping", None)
    pattern = config.integer(alias(config, "sliding_window_pattern", "_sliding_window_pattern"), 6)
    local = layer_types(config, all_but_every(pattern, layer_count(config)))
    turns = rotations(config, rotating(config, 256, base=1e6), local_base=1e4)
    return gemma.read_gemma(
        config,
        activation="hidden_activation",
        usual_activation="gelu_pytorch_tanh",
        windows=windows(config, local, config.optional_integer("sliding_window", 4096)),
        rotations=[turns["sliding_attention" if here else "full_attention"] for here in local],
        attention={
            "scale": config.number("query_pre_attn_scalar", 256) ** -0.5,
            "qk_norm": rms_norm(config, from_one=True),
        },
        layer={"norm_placement": NormPlacement.SANDWICH_NORM},
        model={"logit_softcap": config.optional_number("final_logit_softcapping")},
    )


GEMMA3 = Family(
    model_type="gemma3_text",
    architectures=("Gemma3ForCausalLM", "Gemma3TextModel"),
    read=_read,
    table=table(
        *AROUND,
        *SPLIT_QKV,
        *norm("self_attn.q_norm", "attention.query_norm", Heads.SHARED),
        *norm("self_attn.k_norm", "attention.key_norm", Heads.SHARED),
        *linear("self_attn.o_proj", "attention.output"),
        *GATED_MLP,
    ),
)
