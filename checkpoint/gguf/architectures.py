"""GGUF architectures: what a model of each computes. One record each, side by side.

A GGUF file names an architecture, of which readers know by heart what no key of the file says. Tensors are named alike
in all of them (`gguf_table`), and so are most keys (`gguf_model`, `gguf_rotary`). What converters do to weights is the
architecture's as well: some rows of queries and keys are reordered, and gains that a model keeps as a distance from 1
have that 1 added.

An activation is that of the published models, which is not always the one that other readers compute with: Falcon,
GPT-NeoX, MPT and BERT were trained with the exact GELU. So is a window: StarCoder 2's models were trained to see 4096
tokens, of which converters write nothing. Phi-3.5-MoE has layer norms and routes by SparseMixer, of which files and
other readers know nothing (they divide by the root mean square, and take a softmax). gpt-oss's YaRN blends between
pairs that are no whole numbers, and what its experts' gate and up give is cut at 7.
"""

from dataclasses import dataclass, replace

from ...spec.config import Activation, NormKind, NormPlacement, Residual, RotaryLayout
from ..table import Heads
from .experts import EXPERT_WIDTH, Mixture


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Layers that see `attention.sliding_window` tokens only, and how these rotate."""

    period: int | None
    """Every so manyth layer sees everything, unless the file says which do; None where no layer does."""
    absent: int | None = 0
    """Tokens, where the file does not say; 0 for no windows at all, None where it must say."""
    base: float | None = None
    """Of the frequencies of layers with a window, unless the file says; None for that of the others."""
    scaled: bool = True
    """Whether the scaling of the others' frequencies is theirs too."""
    alone: bool = False
    """Whether only layers with a window rotate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    norm: NormKind = NormKind.RMS
    placement: NormPlacement = NormPlacement.PRE_NORM
    residuals: tuple[Residual, ...] = (Residual.SEQUENTIAL,)
    """Where there are two: the first if the file has a norm for the MLP alone; if both have one, a key says which."""
    rotary: RotaryLayout | None = RotaryLayout.HALF_SPLIT
    """None where nothing rotates."""
    permuted: bool = False
    """Whether rows of queries and keys are kept so that elements 2j and 2j + 1 rotate together. Here they do not."""
    unrotated: int | None = None
    """Every so manyth layer does not rotate."""
    rotation_switch: bool = False
    """Whether `rope.scaling.finetuned` says if anything rotates; elsewhere it says nothing."""
    windows: Windows | None = None
    activation: Activation = Activation.SILU
    gated: bool = True
    gate_in_up: bool = False
    """Whether the gate's rows stand before those of `ffn_up`."""
    qk_norm: Heads | None = None
    """How the gains of query and key norms are kept; where every head has its own, some models have no such norms."""
    qk_norm_optional: bool = False
    """Whether some models have none elsewhere too."""
    qk_norm_rotated: bool = False
    learned_positions: bool = False
    """Beside ALiBi only where the file has a table of them."""
    token_types: bool = False
    embedding_norm: bool = False
    alibi: float | None = None
    """Of the steepest slope, by how many powers of 2 scores fall with every token over all heads (`alibi.slopes`); 0
    where `attention.max_alibi_bias` says it."""
    encoder: bool = False
    """Every token sees all others, and there is no head."""
    required: tuple[str, ...] = ()
    """Keys of scales, caps and clips that a file must have."""
    optional: tuple[str, ...] = ()
    """The same, which it may have."""
    embedding_root: bool = False
    """Whether embeddings are multiplied by the root of their length."""
    logit_divisor: bool = False
    """Whether `logit_scale` divides."""
    experts: Mixture | None = None
    mlp_norm: str = "ffn_norm"
    """The norm of what the MLP reads, where it stands before the MLP."""
    rms_epsilon: bool = False
    """Whether the epsilon of layer norms stands under the key of RMS norms."""
    sinks: bool = False
    whole_yarn: bool = True
    """Whether the two pairs between which YaRN blends are rounded outwards to whole numbers; no key says so."""
    further_layers: bool = False
    """Whether `nextn_predict_layers` of the layers, the last ones, are of no use for plain generation."""
    scaled_by_width: int | None = None
    """With so many layers, scores are divided by the root of hidden elements per head, not of the head's size: so do
    the largest models of some series, and no key says so."""


_LAYER_NORM_GPT = Architecture(
    norm=NormKind.LAYER, rotary=None, activation=Activation.GELU_TANH, gated=False, learned_positions=True
)
_LLAMA = Architecture(permuted=True)
_GRANITE = Architecture(
    permuted=True,
    rotation_switch=True,
    required=("logit_scale",),
    optional=("attention.scale", "embedding_scale", "residual_scale"),
    logit_divisor=True,
)
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")

ARCHITECTURES = {
    "llama": replace(_LLAMA, experts=Mixture(recipe="mixtral", optional=True)),
    "internlm2": _LLAMA,
    "smollm3": Architecture(permuted=True, unrotated=4),
    "granite": _GRANITE,
    "qwen2": Architecture(),
    "qwen3": Architecture(qk_norm=Heads.SHARED),
    "olmo2": Architecture(
        placement=NormPlacement.OUTPUT_NORM, qk_norm=Heads.TOGETHER, windows=Windows(period=4, scaled=False)
    ),
    "phi3": Architecture(gate_in_up=True, windows=Windows(period=None, absent=None)),
    "gemma": Architecture(activation=Activation.GELU_TANH, embedding_root=True),
    "gemma2": Architecture(
        placement=NormPlacement.SANDWICH_NORM,
        activation=Activation.GELU_TANH,
        embedding_root=True,
        windows=Windows(period=2, absent=4096),
        required=_CAPS,
        scaled_by_width=46,
    ),
    "gemma3": Architecture(
        placement=NormPlacement.SANDWICH_NORM,
        activation=Activation.GELU_TANH,
        embedding_root=True,
        qk_norm=Heads.SHARED,
        windows=Windows(period=6, base=10000.0, scaled=False),
        optional=("final_logit_softcapping",),
        scaled_by_width=62,
    ),
    "stablelm": Architecture(
        norm=NormKind.LAYER,
        residuals=(Residual.SEQUENTIAL, Residual.PARALLEL_SHARED_NORM),
        qk_norm=Heads.STACKED,
    ),
    "command-r": Architecture(
        norm=NormKind.LAYER,
        residuals=(Residual.PARALLEL_SHARED_NORM,),
        rotary=RotaryLayout.INTERLEAVED,
        qk_norm=Heads.STACKED,
        required=("logit_scale",),
    ),
    "cohere2": Architecture(
        norm=NormKind.LAYER,
        residuals=(Residual.PARALLEL_SHARED_NORM,),
        rotary=RotaryLayout.INTERLEAVED,
        windows=Windows(period=4, absent=None, alone=True),
        required=("logit_scale",),
    ),
    "gpt2": _LAYER_NORM_GPT,
    "starcoder": _LAYER_NORM_GPT,
    "starcoder2": Architecture(
        norm=NormKind.LAYER,
        windows=Windows(period=None, absent=4096),
        activation=Activation.GELU_TANH,
        gated=False,
    ),
    "bloom": Architecture(
        norm=NormKind.LAYER,
        rotary=None,
        activation=Activation.GELU_TANH,
        gated=False,
        embedding_norm=True,
        alibi=8.0,
    ),
    "mpt": Architecture(
        norm=NormKind.LAYER,
        rotary=None,
        activation=Activation.GELU,
        gated=False,
        learned_positions=True,
        alibi=0.0,
        optional=("attention.clamp_kqv",),
    ),
    "gptneox": Architecture(
        norm=NormKind.LAYER,
        residuals=(Residual.PARALLEL, Residual.SEQUENTIAL),
        activation=Activation.GELU,
        gated=False,
    ),
    "falcon": Architecture(
        norm=NormKind.LAYER,
        residuals=(Residual.PARALLEL, Residual.PARALLEL_SHARED_NORM),
        activation=Activation.GELU,
        gated=False,
    ),
    "phi2": Architecture(
        norm=NormKind.LAYER,
        residuals=(Residual.PARALLEL_SHARED_NORM,),
        activation=Activation.GELU_TANH,
        gated=False,
    ),
    "bert": Architecture(
        norm=NormKind.LAYER,
        placement=NormPlacement.POST_NORM,
        rotary=None,
        activation=Activation.GELU,
        gated=False,
        learned_positions=True,
        token_types=True,
        embedding_norm=True,
        encoder=True,
    ),
    "qwen2moe": Architecture(
        experts=Mixture(recipe="qwen2-moe", width=EXPERT_WIDTH, divided=True, shared="always", shared_gate=True)
    ),
    "qwen3moe": Architecture(
        qk_norm=Heads.SHARED, experts=Mixture(recipe="qwen3-moe", width=EXPERT_WIDTH, divided=True)
    ),
    "olmoe": Architecture(qk_norm=Heads.TOGETHER, experts=Mixture(recipe="olmoe")),
    "granitemoe": replace(_GRANITE, experts=Mixture(recipe="mixtral", shared="said")),
    "phimoe": Architecture(
        norm=NormKind.LAYER,
        rms_epsilon=True,
        windows=Windows(period=None, absent=None),
        experts=Mixture(recipe="phimoe"),
    ),
    "dbrx": Architecture(
        norm=NormKind.LAYER,
        mlp_norm="attn_output_norm",
        optional=("attention.clamp_kqv",),
        experts=Mixture(recipe="qwen3-moe"),
    ),
    "gpt-oss": Architecture(
        mlp_norm="post_attention_norm",
        windows=Windows(period=2, absent=None),
        activation=Activation.GELU_SIGMOID,
        sinks=True,
        whole_yarn=False,
        experts=Mixture(recipe="gpt-oss", width=EXPERT_WIDTH, expert={"bias": True, "clamp": 7.0, "up_offset": 1.0}),
    ),
    "glm4moe": Architecture(
        mlp_norm="post_attention_norm",
        qk_norm=Heads.SHARED,
        qk_norm_optional=True,
        further_layers=True,
        experts=Mixture(recipe="deepseek-v3", width=EXPERT_WIDTH, shared="always", leading_dense=True),
    ),
    "dots1": Architecture(
        qk_norm=Heads.SHARED,
        experts=Mixture(recipe="deepseek-v3", width=EXPERT_WIDTH, shared="always", leading_dense=True),
    ),
    "exaone-moe": Architecture(
        qk_norm=Heads.SHARED,
        windows=Windows(period=4, absent=None, alone=True),
        further_layers=True,
        experts=Mixture(recipe="deepseek-v3", width=EXPERT_WIDTH, shared="always", leading_dense=True),
    ),
    "hunyuan-moe": Architecture(
        qk_norm=Heads.SHARED,
        qk_norm_rotated=True,
        experts=Mixture(recipe="qwen3-moe", width=EXPERT_WIDTH, shared="always"),
    ),
}
"""By the name that `general.architecture` has for them."""
