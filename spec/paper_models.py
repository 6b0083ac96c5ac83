"""The models that the paper measures (Tables I and II of arXiv 2207.00032), as configs without weights.

The tables print hidden size (in thousands), layers and heads. Everything else is counted as if it were GPT-2: layer
norms, learned positions, biases everywhere, an MLP four times as wide as the hidden vector, a tied head, the
vocabulary of 50257. (The released GPT-Neo, GPT-J and GPT-NeoX differ from that in positions, biases or head, which
moves their counts by less than the tables round.) Where Table I rounds a hidden size, it is the multiple of 32 under
which 12 M^2 L, M hidden and L layers, comes within 7 % of the printed billions and that models of that size have.

Three entries differ from what is printed:

- Table I lists four hidden sizes ("6, 8, 12, 12") for the three models of one row; they are 6144, 8192, 12288.
- Table I gives GPT-J 32 heads; the released model has 16.
- Table II has the layers of 8b-moe-128 and 24b-moe-128 swapped, and 1064.9 for 1046.9 billion. With 128 experts on
  every other layer, experts hold (L/2) * 128 * 8 M^2 parameters and the rest 12 M^2 L - (L/2) * 8 M^2:
  M = 4096 gives the printed 349.0 billion with L = 40 (and 262 with the printed 30); M = 8192 gives 1046.9 billion
  with L = 30 (and 1396 with the printed 40), which is also what the authors' MoE tutorial prints.
"""

from dataclasses import dataclass

from .config import Activation, AttentionConfig, Head, LayerConfig, MlpConfig, ModelConfig, NormConfig, NormKind
from .errors import RequestError
from .moe import MoeConfig, router

EXPERTS = 128
VOCABULARY = 50257
CONTEXT = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperModel:
    config: ModelConfig
    printed_billions: float
    """The size that the paper prints, its misprint corrected."""


def paper_model(name: str) -> PaperModel:
    """The model of that name; raises `RequestError` listing the names."""
    if name not in PAPER_MODELS:
        raise RequestError(f"{name!r} is no model of the paper; they are {', '.join(PAPER_MODELS)}")
    return PAPER_MODELS[name]


def reduced(name: str) -> ModelConfig | None:
    """Return a model of the paper with its hidden size divided: "24b-moe-128/64"; None for any other name.

    Layers, experts and vocabulary stay as many; heads are divided as far as they divide, or one is left. So does all
    that is the model's own form, at a size that fits: 24b-moe-128/64 has 264 million parameters of 1,047 billion.

    >>> config = reduced("24b-moe-128/64")
    >>> config.hidden, len(config.layers), config.layers[1].mlp.router.experts, config.layers[1].mlp.expert.width
    (128, 30, 128, 512)

    Raises `RequestError` for a divisor that does not divide the hidden size.
    """
    whole, slash, divisor = name.partition("/")
    if whole not in PAPER_MODELS or not slash:
        return None
    config = PAPER_MODELS[whole].config
    if not divisor.isdecimal() or int(divisor) == 0 or config.hidden % int(divisor):
        raise RequestError(f"{name!r} divides the sizes by {divisor!r}; it must be a divisor of {config.hidden}")
    hidden, by = config.hidden // int(divisor), int(divisor)
    heads = config.layers[0].attention.heads
    heads = heads // by if heads % by == 0 else 1
    sizes = [layer.mlp.router.experts if isinstance(layer.mlp, MoeConfig) else 1 for layer in config.layers]
    return _model(hidden, tuple(_layer(hidden, heads, experts=experts) for experts in sizes))


def _dense(billions: float, *, hidden: int, layers: int, heads: int) -> PaperModel:
    dense = _layer(hidden, heads, experts=1)
    return PaperModel(config=_model(hidden, (dense,) * layers), printed_billions=billions)


def _sparse(billions: float, *, hidden: int, layers: int) -> PaperModel:
    """Experts on every other layer, the second first. Table II prints no heads; 128 elements a head are assumed."""
    dense, sparse = (_layer(hidden, hidden // 128, experts=experts) for experts in (1, EXPERTS))
    return PaperModel(config=_model(hidden, (dense, sparse) * (layers // 2)), printed_billions=billions)


def _layer(hidden: int, heads: int, *, experts: int) -> LayerConfig:
    head_size = hidden // heads
    mlp = MlpConfig(width=4 * hidden, activation=Activation.GELU_TANH, gated=False, bias=True)
    return LayerConfig(
        norm=_NORM,
        attention=AttentionConfig(
            heads=heads,
            kv_heads=heads,
            head_size=head_size,
            scale=head_size**-0.5,
            qkv_bias=True,
            output_bias=True,
        ),
        mlp=mlp if experts == 1 else MoeConfig(router=router("switch", experts=experts, top_k=1), expert=mlp),
    )


def _model(hidden: int, layers: tuple[LayerConfig, ...]) -> ModelConfig:
    return ModelConfig(
        family="gpt2",
        hidden=hidden,
        vocabulary=VOCABULARY,
        context=CONTEXT,
        layers=layers,
        final_norm=_NORM,
        learned_positions=True,
        head=Head.TIED,
    )


_NORM = NormConfig(kind=NormKind.LAYER, epsilon=1e-5)

PAPER_MODELS = {
    "gpt2-1.5b": _dense(1.5, hidden=1600, layers=48, heads=25),
    "gpt-neo-2.7b": _dense(2.7, hidden=2560, layers=32, heads=20),
    "gpt-j-6b": _dense(6, hidden=4096, layers=28, heads=16),
    "gpt-13b": _dense(13, hidden=5120, layers=40, heads=40),
    "gpt-neox-20b": _dense(20, hidden=6144, layers=44, heads=64),
    "gpt-50b": _dense(50, hidden=8192, layers=62, heads=64),
    "gpt-87b": _dense(87, hidden=12288, layers=48, heads=96),
    "lm-175b": _dense(175, hidden=12288, layers=96, heads=96),
    "lm-530b": _dense(530, hidden=20480, layers=105, heads=128),
    "1.3b-moe-128": _sparse(52, hidden=2048, layers=24),
    "2.4b-moe-128": _sparse(107.7, hidden=3584, layers=16),
    "8b-moe-128": _sparse(349.0, hidden=4096, layers=40),
    "24b-moe-128": _sparse(1046.9, hidden=8192, layers=30),
    "47b-moe-128": _sparse(2024.0, hidden=8192, layers=58),
}
"""By the names that `twinfer inspect` takes."""
