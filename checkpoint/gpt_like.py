"""What the families that descend from GPT-2 and BERT share: a key and value for every query head, plain MLPs."""

from typing import Any

from ..spec.config import AttentionConfig, LayerConfig, MlpConfig, ModelConfig
from .family import ACTIVATIONS, head, head_size
from .fields import MOST_LAYERS, Fields
from .permutation import separated_qkv
from .table import QKV, Reorder, Stored, linear, norm


def megatron_layer(
    attention: str,
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm"),
    reorder: Reorder | None = separated_qkv,
) -> tuple[Stored, ...]:
    """Megatron-LM's names of what stands in a layer, which its descendants kept; they differ in that of attention."""
    return (
        *norm(norms[0], "attention_norm"),
        *linear(f"{attention}.query_key_value", *QKV, reorder=reorder),
        *linear(f"{attention}.dense", "attention.output"),
        *norm(norms[1], "mlp_norm"),
        *linear("mlp.dense_h_to_4h", "mlp.up"),
        *linear("mlp.dense_4h_to_h", "mlp.down"),
    )


def multi_head(config: Fields, hidden: int, heads: int, *, bias: bool = True, **other: Any) -> AttentionConfig:
    """Heads that share the hidden elements, scores divided by the root of a head's size; `other` fields as given."""
    size = head_size(config, hidden, heads)
    plain = {"heads": heads, "kv_heads": heads, "head_size": size, "scale": size**-0.5}
    return AttentionConfig(**{**plain, "qkv_bias": bias, "output_bias": bias, **other})


def plain_mlp(config: Fields, width: int, activation: str, usual: str, *, bias: bool = True) -> MlpConfig:
    """An MLP without a gate; `activation` names the field, `usual` what it is where it is absent."""
    return MlpConfig(width=width, activation=config.choice(activation, ACTIVATIONS, usual), gated=False, bias=bias)


def layer_count(config: Fields, name: str, usual: int | None = None) -> int:
    return config.integer(name, most=MOST_LAYERS) if usual is None else config.integer(name, usual, most=MOST_LAYERS)


def model(
    config: Fields, family: str, hidden: int, layers: tuple[LayerConfig, ...], *, tied: bool = True, **other: Any
) -> ModelConfig:
    """The layers between a token table and a head; `tied` where the config does not say. `other` has the context."""
    fields: dict[str, Any] = {"final_norm": layers[0].norm, "learned_positions": False, **other}
    if "vocabulary" not in fields:
        fields["vocabulary"] = config.integer("vocab_size")
    if "head" not in fields:
        fields["head"] = head(config, tied=tied)
    return ModelConfig(family=family, hidden=hidden, layers=layers, **fields)
