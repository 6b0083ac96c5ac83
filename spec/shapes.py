"""Which tensors a config asks for, and of what shape, by their dotted names in the weights dataclasses.

The one place that says so. Weights are checked against it, files are checked against it before anything of them is
read, random weights are drawn by it, and models too large for this machine are counted by it.

Shapes: M hidden, W table width, H query heads, K key/value heads, D head size, J = rotary size / 2, F intermediate,
V vocabulary, P positions, Y token types, E experts.
"""

from .config import AttentionConfig, Head, LayerConfig, MlpConfig, ModelConfig, NormConfig, NormPlacement, Residual
from .moe import MoeConfig

Shapes = dict[str, tuple[int, ...]]

_MATRICES = ("weight_NI", "weight_ENI", "token_VW")
_FLOAT32 = ("router", "shared_gate", "coefficient")
_BUFFERS = ("rotary_frequency_J", "alibi_slope_H")


def is_matrix(name: str) -> bool:
    """Whether the tensor of that name is kept in the chosen `Storage`; all others stay float32.

    >>> is_matrix("attention.query.weight_NI"), is_matrix("attention.query.bias_N"), is_matrix("mlp.router.weight_NI")
    (True, False, False)
    """
    *_, part, tensor = ("", *name.split("."))
    return tensor in _MATRICES and part not in _FLOAT32


def is_buffer(name: str) -> bool:
    """Whether the tensor is computed when a model is loaded, in float64, rather than read; it is no parameter."""
    return name.rpartition(".")[2] in _BUFFERS


def trained(shapes: Shapes) -> Shapes:
    """Those that are read, not made."""
    return {name: shape for name, shape in shapes.items() if not is_buffer(name)}


def embedding_shapes(config: ModelConfig) -> Shapes:
    shapes: Shapes = {"token_VW": (config.vocabulary, config.table_width)}
    if config.learned_positions:
        shapes["position_PM"] = (config.context, config.hidden)
    if config.token_types:
        shapes["type_YM"] = (config.token_types, config.hidden)
    if config.embedding_norm is not None:
        shapes |= _norm("norm", config.embedding_norm, config.hidden)
    if config.embedding_size is not None:
        shapes |= _linear("projection", config.hidden, config.embedding_size, bias=False)
    return shapes


def layer_shapes(config: LayerConfig, hidden: int) -> Shapes:
    mlp = _moe(config.mlp, hidden) if isinstance(config.mlp, MoeConfig) else _mlp("mlp", config.mlp, hidden)
    shapes = {**_attention(config.attention, hidden), **mlp}
    for name in _layer_norms(config):
        shapes |= _norm(name, config.norm, hidden)
    return shapes


def head_shapes(config: ModelConfig) -> Shapes:
    shapes: Shapes = {}
    if config.final_norm is not None:
        shapes |= _norm("norm", config.final_norm, config.hidden)
    if config.embedding_size is not None and config.head is not Head.NONE:
        shapes |= _linear("reduction", config.embedding_size, config.hidden, bias=False)
    if config.head is Head.UNTIED:
        shapes |= _linear("projection", config.vocabulary, config.table_width, bias=False)
    if config.head_bias:
        shapes["bias_V"] = (config.vocabulary,)
    return shapes


def _layer_norms(config: LayerConfig) -> list[str]:
    names = []
    if config.norm_placement in (NormPlacement.PRE_NORM, NormPlacement.SANDWICH_NORM, NormPlacement.STREAM_NORM):
        names.append("attention_norm")
        if config.residual is not Residual.PARALLEL_SHARED_NORM:
            names.append("mlp_norm")
    if config.norm_placement in (NormPlacement.OUTPUT_NORM, NormPlacement.SANDWICH_NORM, NormPlacement.POST_NORM):
        names += ["attention_output_norm", "mlp_output_norm"]
    return names


def _attention(config: AttentionConfig, hidden: int) -> Shapes:
    query_width, kv_width = config.heads * config.head_size, config.kv_heads * config.head_size
    shapes = {
        **_linear("attention.query", query_width, hidden, config.qkv_bias),
        **_linear("attention.key", kv_width, hidden, config.qkv_bias),
        **_linear("attention.value", kv_width, hidden, config.qkv_bias),
        **_linear("attention.output", hidden, query_width, config.output_bias),
    }
    if config.rotary is not None:
        shapes["attention.rotary_frequency_J"] = (config.rotary.size // 2,)
    if config.alibi:
        shapes["attention.alibi_slope_H"] = (config.heads,)
    if config.sinks:
        shapes["attention.sink_H"] = (config.heads,)
    if config.qk_norm is not None:
        shapes |= _norm("attention.query_norm", config.qk_norm, query_width)
        shapes |= _norm("attention.key_norm", config.qk_norm, kv_width)
    return shapes


def _mlp(name: str, config: MlpConfig, hidden: int) -> Shapes:
    shapes = {
        **_linear(f"{name}.up", config.width, hidden, config.bias),
        **_linear(f"{name}.down", hidden, config.width, config.bias),
    }
    if config.gated:
        shapes |= _linear(f"{name}.gate", config.width, hidden, config.bias)
    return shapes


def _moe(config: MoeConfig, hidden: int) -> Shapes:
    experts = config.router.experts
    shapes = _linear("mlp.router", experts, hidden, config.router.logit_bias)
    if config.router.choice_bias:
        shapes["mlp.choice_bias_E"] = (experts,)
    for name, shape in _mlp("mlp.experts", config.expert, hidden).items():
        shapes[f"{name.rpartition('_')[0]}_E{name.rpartition('_')[2]}"] = (experts, *shape)
    if config.shared is not None:
        shapes |= _mlp("mlp.shared", config.shared, hidden)
    if config.shared_gate:
        shapes |= _linear("mlp.shared_gate", 1, hidden, bias=False)
    if config.residual is not None:
        shapes |= _mlp("mlp.residual", config.residual, hidden)
        shapes |= _linear("mlp.coefficient", 2, hidden, bias=True)
    return shapes


def _norm(name: str, config: NormConfig, width: int) -> Shapes:
    shapes: Shapes = {f"{name}.gain_M": (width,)}
    if config.bias:
        shapes[f"{name}.bias_M"] = (width,)
    return shapes


def _linear(name: str, outputs: int, inputs: int, bias: bool) -> Shapes:
    shapes: Shapes = {f"{name}.weight_NI": (outputs, inputs)}
    if bias:
        shapes[f"{name}.bias_N"] = (outputs,)
    return shapes
