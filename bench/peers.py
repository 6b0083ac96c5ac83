"""The same weights in another library, so that a comparison is of implementations and not of models."""

from typing import Any

import torch
from torch import Tensor

from ..spec.config import (
    Activation,
    AttentionConfig,
    Head,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    NormKind,
    RotaryConfig,
    RotaryLayout,
)
from ..spec.errors import MachineError, RequestError
from ..spec.weights import WeightSource, tensors

_NAMES = {
    "attention_norm.gain_M": "input_layernorm.weight",
    "attention.query.weight_NI": "self_attn.q_proj.weight",
    "attention.key.weight_NI": "self_attn.k_proj.weight",
    "attention.value.weight_NI": "self_attn.v_proj.weight",
    "attention.output.weight_NI": "self_attn.o_proj.weight",
    "mlp_norm.gain_M": "post_attention_layernorm.weight",
    "mlp.gate.weight_NI": "mlp.gate_proj.weight",
    "mlp.up.weight_NI": "mlp.up_proj.weight",
    "mlp.down.weight_NI": "mlp.down_proj.weight",
}


def transformers_llama(source: WeightSource) -> Any:
    """A `transformers` LlamaForCausalLM in float32 with the source's weights, in evaluation mode.

    Raises `MachineError` where transformers is not installed, `RequestError` where the model is no plain LLaMA.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise MachineError("this comparison needs transformers; install it with: pip install transformers") from None
    config, layer = source.config, source.config.layers[0]
    attention, mlp = layer.attention, layer.mlp
    if config != _llama_like(config):
        raise RequestError(f"this comparison is for LLaMA-like models; the model given is of family {config.family}")
    frequency_J = source.layer(0).attention.rotary_frequency_J
    assert frequency_J is not None, "LLaMA-like models rotate"
    model: Any
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=config.hidden,
                vocab_size=config.vocabulary,
                intermediate_size=mlp.width,
                num_hidden_layers=len(config.layers),
                num_attention_heads=attention.heads,
                num_key_value_heads=attention.kv_heads,
                head_dim=attention.head_size,
                rms_norm_eps=layer.norm.epsilon,
                max_position_embeddings=config.context,
                tie_word_embeddings=config.head is Head.TIED,
            )
        )
    model = model.to_empty(device="cpu").eval()
    model.load_state_dict(_state(source), strict=True)
    model.model.rotary_emb.inv_freq = frequency_J.to(torch.float32)
    return model


def _llama_like(config: ModelConfig) -> ModelConfig:
    """The LLaMA of the same sizes: whatever the config has besides them, this has not."""
    first = config.layers[0]
    head_size = first.attention.head_size
    norm = NormConfig(kind=NormKind.RMS, epsilon=first.norm.epsilon)
    layer = LayerConfig(
        norm=norm,
        attention=AttentionConfig(
            heads=first.attention.heads,
            kv_heads=first.attention.kv_heads,
            head_size=head_size,
            scale=head_size**-0.5,
            rotary=RotaryConfig(layout=RotaryLayout.HALF_SPLIT, size=head_size),
        ),
        mlp=MlpConfig(width=first.mlp.width, activation=Activation.SILU, gated=True),
    )
    return ModelConfig(
        family=config.family,
        hidden=config.hidden,
        vocabulary=config.vocabulary,
        context=config.context,
        layers=(layer,) * len(config.layers),
        final_norm=norm,
        learned_positions=False,
        head=config.head,
    )


def _state(source: WeightSource) -> dict[str, Tensor]:
    head, token_VE = source.head(), source.embedding().token_VE
    assert head.norm is not None, "LLaMA-like models have a final norm"
    projection_VE = token_VE if head.projection is None else head.projection.weight_NI
    state = {
        "model.embed_tokens.weight": token_VE,
        "model.norm.weight": head.norm.gain_M,
        "lm_head.weight": projection_VE,
    }
    for index in range(len(source.config.layers)):
        for name, tensor in tensors(source.layer(index)):
            if name != "attention.rotary_frequency_J":
                state[f"model.layers.{index}.{_NAMES[name]}"] = tensor
    return state
