"""Gemma 2: Gemma's, with norms on both sides of attention and MLP, capped scores and logits, windows in turn."""

from ...spec.config import NormPlacement
from ..family import Family, ParsedConfig
from ..fields import Fields
from ..llama_like import GATED_MLP, SPLIT_QKV, all_but_every, layer_count, layer_types, table, windows
from ..table import linear, norm
from . import gemma

AROUND = (
    *norm("input_layernorm", "attention_norm"),
    *norm("post_attention_layernorm", "attention_output_norm"),
    *norm("pre_feedforward_layernorm", "mlp_norm"),
    *norm("post_feedforward_layernorm", "mlp_output_norm"),
)


def _read(config: Fields) -> ParsedConfig:
    window = config.optional_integer("sliding_window", 4096)
    config.only("sliding_window_size", None, window)  # the same under another name, in the first files
    activation = config.text("hidden_activation", "gelu_pytorch_tanh")
    config.only("hidden_act", activation)  # likewise
    return gemma.read_gemma(
        config,
        activation="hidden_activation",
        usual_activation=activation,
        windows=windows(config, layer_types(config, all_but_every(2, layer_count(config))), window),
        attention={
            "scale": config.number("query_pre_attn_scalar", 256) ** -0.5,
            "softcap": _cap(config, "attn_logit_softcapping", 50.0),
        },
        layer={"norm_placement": NormPlacement.SANDWICH_NORM},
        model={"logit_softcap": _cap(config, "final_logit_softcapping", 30.0)},
    )


def _cap(config: Fields, name: str, absent: float) -> float | None:
    """Null is no cap, which is not the same as the field being absent."""
    return config.optional_number(name) if name in config.names() else absent


GEMMA2 = Family(
    model_type="gemma2",
    architectures=("Gemma2ForCausalLM", "Gemma2Model"),
    read=_read,
    table=table(*AROUND, *SPLIT_QKV, *linear("self_attn.o_proj", "attention.output"), *GATED_MLP),
)
