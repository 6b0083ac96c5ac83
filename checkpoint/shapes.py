"""Which tensors a config asks for, and of what shape, by their dotted names in the weights dataclasses.

Knowing these before anything is read lets a whole checkpoint be checked from its header alone. Rotary frequencies are
not among them: they are made, not read.

Shapes: M hidden, H query heads, K key/value heads, D head size, F intermediate, V vocabulary, P positions.
"""

from ..spec.config import LayerConfig, ModelConfig, NormConfig, NormKind

Shapes = dict[str, tuple[int, ...]]


def embedding_shapes(config: ModelConfig) -> Shapes:
    shapes: Shapes = {"token_VM": (config.vocabulary, config.hidden)}
    if config.learned_positions:
        shapes["position_PM"] = (config.context, config.hidden)
    return shapes


def layer_shapes(layer: LayerConfig, hidden: int) -> Shapes:
    attention, mlp = layer.attention, layer.mlp
    query_width, kv_width = attention.heads * attention.head_size, attention.kv_heads * attention.head_size
    shapes: Shapes = {}
    _norm(shapes, "attention_norm", layer.norm, hidden)
    _linear(shapes, "attention.query", query_width, hidden, attention.qkv_bias)
    _linear(shapes, "attention.key", kv_width, hidden, attention.qkv_bias)
    _linear(shapes, "attention.value", kv_width, hidden, attention.qkv_bias)
    _linear(shapes, "attention.output", hidden, query_width, attention.output_bias)
    _norm(shapes, "mlp_norm", layer.norm, hidden)
    if mlp.gated:
        _linear(shapes, "mlp.gate", mlp.width, hidden, mlp.bias)
    _linear(shapes, "mlp.up", mlp.width, hidden, mlp.bias)
    _linear(shapes, "mlp.down", hidden, mlp.width, mlp.bias)
    return shapes


def head_shapes(config: ModelConfig) -> Shapes:
    shapes: Shapes = {}
    _norm(shapes, "norm", config.final_norm, config.hidden)
    if not config.tied_head:
        _linear(shapes, "projection", config.vocabulary, config.hidden, False)
    return shapes


def _norm(shapes: Shapes, name: str, config: NormConfig, hidden: int) -> None:
    shapes[f"{name}.gain_M"] = (hidden,)
    if config.kind is NormKind.LAYER:
        shapes[f"{name}.bias_M"] = (hidden,)


def _linear(shapes: Shapes, name: str, outputs: int, inputs: int, bias: bool) -> None:
    shapes[f"{name}.weight_NI"] = (outputs, inputs)
    if bias:
        shapes[f"{name}.bias_N"] = (outputs,)
