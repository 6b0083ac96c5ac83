"""What a model is: frozen configs, and an enum for every convention that people trip over.

A `ModelConfig` is a tuple of `LayerConfig`s plus what stands before and after them. Anything that can differ from layer
to layer (a window, a mixture of experts) is a field of the layer, so an irregular model needs no special case: its
layers are just not all equal.

Sizes count elements, lengths count tokens. Every config checks itself when it is made and raises `ConfigError`.
"""

from dataclasses import dataclass
from enum import StrEnum

from .errors import ConfigError
from .mlp import Activation as Activation
from .mlp import MlpConfig as MlpConfig
from .mlp import require, require_positive
from .moe import MoeConfig


class NormKind(StrEnum):
    """How a norm centers and scales one token's hidden vector."""

    LAYER = "layer"
    """Subtract the mean, divide by the standard deviation, then gain and bias."""
    RMS = "rms"
    """Divide by the root mean square, then gain; nothing is subtracted."""


class NormPlacement(StrEnum):
    """Where a layer normalizes, around f: first the attention, then the MLP."""

    PRE_NORM = "pre_norm"
    """x + f(norm(x)): GPT-2, LLaMA."""
    OUTPUT_NORM = "output_norm"
    """x + norm(f(x)): OLMo 2."""
    SANDWICH_NORM = "sandwich_norm"
    """x + norm(f(norm(x))), with a norm of its own on either side: Gemma 2."""
    POST_NORM = "post_norm"
    """norm(x + f(x)): the original transformer, BERT, OPT-350m."""
    STREAM_NORM = "stream_norm"
    """n + f(n), with n = norm(x): what is read is also what is added to; BLOOM's post-layernorm residual."""


class Residual(StrEnum):
    """What the MLP reads, and what it is added to."""

    SEQUENTIAL = "sequential"
    """The stream with the attention already added."""
    PARALLEL = "parallel"
    """What attention read, through a norm of its own: x + attention(norm(x)) + mlp(norm'(x)), GPT-NeoX."""
    PARALLEL_SHARED_NORM = "parallel_shared_norm"
    """The same, one norm for both: GPT-J, Phi, Cohere, Falcon-7B."""


class QkNormSpan(StrEnum):
    """What one norm of queries (or keys) reduces over."""

    HEAD = "head"
    """The elements of one head: Qwen 3, Gemma 3."""
    ALL_HEADS = "all_heads"
    """The elements of all heads together: OLMo 2."""


class RotaryLayout(StrEnum):
    """Which two elements of a head rotate together."""

    HALF_SPLIT = "half_split"
    """Element j with element j + size/2: Hugging Face's LLaMA."""
    INTERLEAVED = "interleaved"
    """Element 2j with element 2j + 1: Meta's LLaMA, GPT-J. Q and K rows permuted accordingly give equal scores."""


class Head(StrEnum):
    """Where the matrix that scores the vocabulary comes from."""

    TIED = "tied"
    """It is the token table."""
    UNTIED = "untied"
    NONE = "none"
    """There is none: the hidden vectors are the result."""


class Pooling(StrEnum):
    """How the hidden vectors of a text's tokens become one vector of the text."""

    MEAN = "mean"
    """The mean of all, those of special tokens among them: Sentence-BERT, MiniLM."""
    CLS = "cls"
    """The first, which in BERT is that of the special token [CLS]: BGE."""


class Storage(StrEnum):
    """How matrices (linear weights and the token table) are kept. Norms, biases and positions stay float32."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    """Rounded to nearest, ties to even."""
    INT8 = "int8"
    """Symmetric, one float32 scale a row (an output of a linear, a token of the table); rounded half to even."""
    INT4 = "int4"
    """Asymmetric, a float32 step and lowest value for each group of `INT4_GROUP` inputs of a row; half to even."""


INT4_GROUP = 64
"""How many consecutive inputs of a row share a step in int4 storage; the last group of a row may be shorter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NormConfig:
    kind: NormKind
    epsilon: float
    """Added to the variance (or mean square) before the root."""
    bias: bool = True
    """Whether it adds a bias. An RMS norm has none, and this is false whatever is given: equal norms are equal."""
    gain_from_one: bool = False
    """Whether the gain is stored as its distance from 1, as Gemma does: what multiplies is 1 + gain."""

    def __post_init__(self) -> None:
        if self.kind is NormKind.RMS:
            object.__setattr__(self, "bias", False)
        require(self.epsilon > 0, "NormConfig.epsilon", self.epsilon, "a positive number, such as 1e-5")


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryConfig:
    """Rotary position embedding. The frequencies themselves are weights (`AttentionWeights.rotary_frequency_J`)."""

    layout: RotaryLayout
    size: int
    """How many leading elements of each head rotate; the rest pass unchanged."""
    attention_factor: float = 1.0
    """Multiplies cos and sin, and so what rotates: YaRN, LongRoPE."""

    def __post_init__(self) -> None:
        require(
            self.attention_factor > 0,
            "RotaryConfig.attention_factor",
            self.attention_factor,
            "a positive number, usually 1",
        )
        require(self.size > 0 and self.size % 2 == 0, "RotaryConfig.size", self.size, "a positive even number")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionConfig:
    heads: int
    """Query heads, H."""
    kv_heads: int
    """Key/value heads, K: H for multi-head, 1 for multi-query; query head h reads key/value head h // (H // K)."""
    head_size: int
    """D. Need not be hidden / heads."""
    scale: float
    """Multiplies every score; usually head_size ** -0.5."""
    causal: bool = True
    """Whether a token sees nothing after itself. False for encoders, whose sequences cannot be extended."""
    window: int | None = None
    """A token sees itself and the window - 1 before it; None sees everything before."""
    rotary: RotaryConfig | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    alibi: bool = False
    """Each score falls with distance, by a slope of the head's own (`AttentionWeights.alibi_slope_H`): BLOOM, MPT."""
    softcap: float | None = None
    """Scores are bent into -softcap .. softcap, before they are masked: Gemma 2."""
    qkv_clip: float | None = None
    """Queries, keys and values are cut to -qkv_clip .. qkv_clip as soon as they are projected: MPT, OLMo."""
    qk_norm: NormConfig | None = None
    """Queries and keys are normalized."""
    qk_norm_span: QkNormSpan = QkNormSpan.HEAD
    qk_norm_rotated: bool = False
    """Whether that is done after they rotate, to what rotated: Hunyuan. Gains then meet other elements."""
    sinks: bool = False
    """Each head has one more score, its `AttentionWeights.sink_H`, in the softmax's denominator only: gpt-oss."""

    def __post_init__(self) -> None:
        require(
            self.causal or not self.alibi, "AttentionConfig.alibi", self.alibi, "false where attention is not causal"
        )
        for field in ("softcap", "qkv_clip"):
            value = getattr(self, field)
            require(value is None or value > 0, f"AttentionConfig.{field}", value, "a positive number, or None")
        require(
            not self.qk_norm_rotated or self.qk_norm_span is QkNormSpan.HEAD,
            "AttentionConfig.qk_norm_rotated",
            self.qk_norm_rotated,
            "false where the norm is over all heads",
        )
        require_positive(self, "heads", "kv_heads", "head_size")
        require(
            self.heads % self.kv_heads == 0,
            "AttentionConfig.kv_heads",
            self.kv_heads,
            f"a divisor of heads, which is {self.heads}",
        )
        require(self.scale > 0, "AttentionConfig.scale", self.scale, "a positive number, such as head_size ** -0.5")
        if self.window is not None:
            require(self.window > 0, "AttentionConfig.window", self.window, "at least 1, or None for no window")
        if self.rotary is not None:
            require(
                self.rotary.size <= self.head_size,
                "RotaryConfig.size",
                self.rotary.size,
                f"at most head_size, which is {self.head_size}",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """One transformer layer; all of its norms are of one kind."""

    norm: NormConfig
    attention: AttentionConfig
    mlp: MlpConfig | MoeConfig
    """A dense MLP, or a mixture of experts in its place."""
    norm_placement: NormPlacement = NormPlacement.PRE_NORM
    residual: Residual = Residual.SEQUENTIAL
    residual_scale: float = 1.0
    """Multiplies what attention and MLP add to the stream: Granite."""

    def __post_init__(self) -> None:
        require(
            self.residual is Residual.SEQUENTIAL or self.norm_placement is NormPlacement.PRE_NORM,
            "LayerConfig.norm_placement",
            self.norm_placement.value,
            f"pre_norm, where the residual is {self.residual.value}",
        )
        require(self.residual_scale > 0, "LayerConfig.residual_scale", self.residual_scale, "a positive number")

    @property
    def dense_mlp(self) -> MlpConfig:
        """The MLP. Raises `ConfigError` where a mixture of experts is in its place."""
        if isinstance(self.mlp, MoeConfig):
            raise ConfigError(f"the layer has {self.mlp.router.experts} experts; here it must have one MLP")
        return self.mlp


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder or encoder: token table, layers, final norm, head.

    What enters the first layer is embedding_norm(embedding_scale * projected(token) + position + type), and what leaves
    the last becomes logits = cap(logit_scale * (head @ reduced(final_norm(x)) + head_bias)); what a model lacks is left
    out. Tables narrower or wider than the hidden vector are projected to it, and it is reduced to their width again.
    """

    family: str
    """Where it came from ("llama", "gpt2"); nothing is computed from it."""
    hidden: int
    """M."""
    vocabulary: int
    """V."""
    context: int
    """The most tokens a sequence may hold, prompt and new tokens together."""
    layers: tuple[LayerConfig, ...]
    final_norm: NormConfig | None
    learned_positions: bool
    """Whether a learned vector for each position is added to the token's."""
    head: Head
    embedding_size: int | None = None
    """Width of the token table where it is not that of the hidden vector: OPT-350m."""
    embedding_scale: float = 1.0
    """Gemma (the root of M), Granite."""
    embedding_norm: NormConfig | None = None
    """BLOOM, BERT."""
    token_types: int = 0
    """How many learned vectors say which segment a token belongs to (BERT); without a word about it, the first."""
    head_bias: bool = False
    logit_scale: float = 1.0
    """Cohere, Granite."""
    logit_softcap: float | None = None
    """Logits are bent into -softcap .. softcap: Gemma 2."""

    @property
    def extensible(self) -> bool:
        """Whether it is a decoder: its sequences can grow, for no layer sees later tokens, and a head says how."""
        return self.head is not Head.NONE and all(layer.attention.causal for layer in self.layers)

    @property
    def mixtures(self) -> dict[int, MoeConfig]:
        """The mixtures of experts, by the index of their layer."""
        return {index: layer.mlp for index, layer in enumerate(self.layers) if isinstance(layer.mlp, MoeConfig)}

    @property
    def table_width(self) -> int:
        """Elements of a row of the token table, W."""
        return self.hidden if self.embedding_size is None else self.embedding_size

    def __post_init__(self) -> None:
        require_positive(self, "hidden", "vocabulary", "context", "table_width")
        require(self.token_types >= 0, "ModelConfig.token_types", self.token_types, "at least 0")
        for field in ("embedding_scale", "logit_scale"):
            require(getattr(self, field) > 0, f"ModelConfig.{field}", getattr(self, field), "a positive number")
        cap = self.logit_softcap
        require(cap is None or cap > 0, "ModelConfig.logit_softcap", cap, "a positive number, or None")
        headless = self.head is Head.NONE
        require(not (headless and self.head_bias), "ModelConfig.head_bias", self.head_bias, "false without a head")
        require(len(self.layers) > 0, "ModelConfig.layers", self.layers, "at least one layer")
        for index, layer in enumerate(self.layers):
            capacity = layer.mlp.capacity if isinstance(layer.mlp, MoeConfig) else None
            right = "None inside a model, where a token's result must not depend on what else is computed with it"
            require(capacity is None, f"MoeConfig.capacity of layer {index}", capacity, right)
