"""What the keys of a GGUF file mean: a config, by what its architecture says of them.

What no key says is told by which tensors the file holds: biases, an own head, norms of queries and keys, a parallel
residual.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from ...spec.config import (
    AttentionConfig,
    Head,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    NormKind,
    QkNormSpan,
    Residual,
)
from ...spec.moe import MoeConfig
from .. import alibi
from ..family import ParsedConfig, head_size
from ..fields import MOST_LAYERS, Fields
from ..rotary_fields import Rotation
from ..table import Heads
from . import experts
from . import rotary as gguf_rotary
from .architectures import Architecture, Windows
from .file import GgufFile
from .table import layer_norms

EPSILONS = {
    NormKind.RMS: "attention.layer_norm_rms_epsilon",
    NormKind.LAYER: "attention.layer_norm_epsilon",
}

IGNORED = (
    "tensor_data_layout",  # how the tool that wrote the file came by it
    "rope.scaling.finetuned",  # where it matters, it has been read
    "rope.scaling.original_context_length",  # says what a scaling was made for; where it matters, it has been read
    "use_parallel_residual",  # StableLM's say true where the model says nothing; the norms tell
    "pooling_type",  # what is made of hidden vectors afterwards
    *EPSILONS.values(),  # of the other kind of norm
)


def understood(name: str, architecture: Architecture, fields: Fields, file: GgufFile) -> ParsedConfig:
    """Read every key. Raises `ConfigError` or `WeightError` for what is not fully parsed."""
    reading = _Reading(architecture, fields, file.shapes)
    context, layers = fields.integer("context_length"), layer_count(architecture, fields)
    feeds = experts.feeds(architecture.experts, fields, layers)
    slopes, numbers = reading.slopes(), reading.numbers()
    attention = reading.attention(numbers, layers, with_alibi=slopes is not None)
    everywhere, local = gguf_rotary.rotations(architecture, fields, file, attention.head_size, context)
    windows = _windows(architecture.windows, fields, layers)
    turns = [everywhere if window is None else local or everywhere for window in windows]
    if architecture.unrotated is not None:
        turns = [None if (index + 1) % architecture.unrotated == 0 else turn for index, turn in enumerate(turns)]
    layer = LayerConfig(
        norm=reading.norm(f"blk.0.{next(iter(layer_norms(architecture, file.shapes)))}"),
        attention=attention,
        mlp=reading.mlp(),
        norm_placement=architecture.placement,
        residual=reading.residual(),
        residual_scale=numbers.get("residual_scale", 1.0),
    )
    each = tuple(_layer(layer, *own) for own in zip(windows, turns, feeds(layer.dense_mlp), strict=True))
    model = reading.model(name, numbers, context, each)
    fields.ignore(IGNORED)
    fields.finish()
    return ParsedConfig(config=model, rotations=tuple(turns), slopes=slopes)


@dataclass(frozen=True, slots=True)
class _Reading:
    architecture: Architecture
    fields: Fields
    shapes: Mapping[str, tuple[int, ...]]
    """Of the file's tensors."""

    def numbers(self) -> dict[str, float]:
        """Scales, caps and clips, by their keys."""
        optional = [key for key in self.architecture.optional if self.fields.has(key)]
        return {key: self.fields.number(key) for key in (*self.architecture.required, *optional)}

    def norm(self, tensor: str) -> NormConfig:
        kind = self.architecture.norm
        epsilon = self.fields.number(EPSILONS[NormKind.RMS if self.architecture.rms_epsilon else kind])
        return NormConfig(kind=kind, epsilon=epsilon, bias=self._has(f"{tensor}.bias"))

    def attention(self, numbers: Mapping[str, float], layers: int, *, with_alibi: bool) -> AttentionConfig:
        hidden, heads = self.fields.integer("embedding_length"), self._heads()
        length = "attention.key_length"
        size = self.fields.integer(length) if self.fields.has(length) else head_size(self.fields, hidden, heads)
        self.fields.only("attention.value_length", size)
        self.fields.only("attention.causal", not self.architecture.encoder)
        width = hidden // heads if layers == self.architecture.scaled_by_width else size
        kept = self.architecture.qk_norm
        optional = kept is Heads.STACKED or self.architecture.qk_norm_optional
        normed = kept is not None and (not optional or self._has("blk.0.attn_q_norm.weight"))
        return AttentionConfig(
            heads=heads,
            kv_heads=self.fields.integer("attention.head_count_kv", heads),
            head_size=size,
            scale=numbers.get("attention.scale", width**-0.5),
            causal=not self.architecture.encoder,
            qkv_bias=self._has("blk.0.attn_q.bias") or self._has("blk.0.attn_qkv.bias"),
            output_bias=self._has("blk.0.attn_output.bias"),
            alibi=with_alibi,
            softcap=numbers.get("attn_logit_softcapping"),
            qkv_clip=numbers.get("attention.clamp_kqv"),
            qk_norm=self.norm("blk.0.attn_q_norm") if normed else None,
            qk_norm_span=QkNormSpan.ALL_HEADS if kept is Heads.TOGETHER else QkNormSpan.HEAD,
            qk_norm_rotated=self.architecture.qk_norm_rotated,
            sinks=self.architecture.sinks,
        )

    def mlp(self) -> MlpConfig:
        return MlpConfig(
            width=self.fields.integer("feed_forward_length"),
            activation=self.architecture.activation,
            gated=self.architecture.gated,
            bias=self._has("blk.0.ffn_up.bias"),
        )

    def model(
        self, name: str, numbers: Mapping[str, float], context: int, layers: tuple[LayerConfig, ...]
    ) -> ModelConfig:
        architecture, hidden = self.architecture, self.fields.integer("embedding_length")
        rows = {name: shape[0] for name, shape in self.shapes.items() if shape}
        scale = numbers.get("logit_scale", 1.0)
        positions = architecture.alibi is None or self._has("position_embd.weight")
        return ModelConfig(
            family=name,
            hidden=hidden,
            vocabulary=self.fields.integer("vocab_size", rows.get("token_embd.weight", 0)),
            context=context,
            layers=layers,
            final_norm=None if architecture.encoder else self.norm("output_norm"),
            learned_positions=architecture.learned_positions and positions,
            head=self._head(),
            embedding_scale=math.sqrt(hidden) if architecture.embedding_root else numbers.get("embedding_scale", 1.0),
            embedding_norm=self.norm("token_embd_norm") if architecture.embedding_norm else None,
            token_types=rows.get("token_types.weight", 0) if architecture.token_types else 0,
            head_bias=self._has("output.bias"),
            logit_scale=1 / scale if architecture.logit_divisor else scale,
            logit_softcap=numbers.get("final_logit_softcapping"),
        )

    def residual(self) -> Residual:
        if len(self.architecture.residuals) == 1:
            return self.architecture.residuals[0]
        first, second = self.architecture.residuals
        if second is not Residual.PARALLEL_SHARED_NORM:
            return first if self.fields.flag("use_parallel_residual") else second
        return first if self._has("blk.0.ffn_norm.weight") or self._has("blk.0.attn_norm_2.weight") else second

    def slopes(self) -> Callable[[], Tensor] | None:
        """What makes ALiBi's slopes, where the model has them."""
        most, key = self.architecture.alibi, "attention.max_alibi_bias"
        if most == 0 and self.fields.values.get(key) == 0:
            self.fields.ignore((key,))
            return None
        if most is None:
            return None
        return partial(alibi.slopes, self._heads(), most or self.fields.number(key))

    def _heads(self) -> int:
        return self.fields.integer("attention.head_count")

    def _head(self) -> Head:
        if self.architecture.encoder:
            return Head.NONE
        return Head.UNTIED if self._has("output.weight") else Head.TIED

    def _has(self, tensor: str) -> bool:
        return tensor in self.shapes


def layer_count(architecture: Architecture, fields: Fields) -> int:
    """The layers that a token goes through."""
    layers = fields.integer("block_count", most=MOST_LAYERS)
    if not architecture.further_layers:
        return layers
    return layers - fields.integer("nextn_predict_layers", 0, least=0, most=layers - 1)


def _layer(shared: LayerConfig, window: int | None, turn: Rotation | None, mlp: MlpConfig | MoeConfig) -> LayerConfig:
    turning = None if turn is None else turn.config
    return replace(shared, attention=replace(shared.attention, window=window, rotary=turning), mlp=mlp)


def _windows(windows: Windows | None, fields: Fields, layers: int) -> list[int | None]:
    """Of each layer, how many tokens it sees; None for all."""
    if windows is None:
        return [None] * layers
    window, least = windows.absent, 1 if windows.alone else 0
    if fields.has("attention.sliding_window") or windows.absent is None:
        window = fields.integer("attention.sliding_window", least=least)
    return [window or None if here else None for here in _windowed(windows, fields, layers)]


def _windowed(windows: Windows, fields: Fields, layers: int) -> list[bool]:
    """Of each layer, whether it has the window."""
    if windows.period is None:
        return [True] * layers
    key = "attention.sliding_window_pattern"
    fields.ignore((key,))
    pattern = fields.values.get(key, windows.period)
    if isinstance(pattern, list) and len(pattern) == layers and all(each in (False, True) for each in pattern):
        return [bool(each) for each in pattern]
    if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern > 0:
        return [(index + 1) % pattern != 0 for index in range(layers)]
    raise fields.wrong(key, f"a whole number above 0, or true or false for each of the {layers} layers")
