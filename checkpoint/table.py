"""A family's weight-name table: what each tensor in its files fills.

Tables are read side by side, so they are written in shorthand: `linear` and `norm` name a module of the file and the
part of ours that it fills, weight and bias at once. Weights that a config does not ask for (a bias, in a model without)
are not looked for, so one table serves models with and without.

`plan` matches a table with a file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from torch import Tensor

from ..spec.config import LayerConfig

Reorder = Callable[[Tensor, LayerConfig], Tensor]
"""Puts rows that a file keeps in an order of its own into ours."""

QKV = ("attention.query", "attention.key", "attention.value")
"""What a merged projection fills, in the order in which most files stack the three."""


GATE_UP = ("mlp.experts.gate", "mlp.experts.up")
"""The parts of a merged projection of experts, in the order in which most files stack the two."""


class Heads(Enum):
    """How a file keeps numbers of which every head has one row, D of them, where ours are [H * D]."""

    TOGETHER = auto()
    """[H * D]."""
    STACKED = auto()
    """[H, D]."""
    SHARED = auto()
    """[D], the same for every head."""


class Experts(Enum):
    """How a file keeps one linear map of every expert, where ours are [E, N, I]."""

    APART = auto()
    """One tensor an expert, whose number is `{expert}` in the name."""
    STACKED = auto()
    """[E, N, I]."""
    FLAT = auto()
    """[E * N, I]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One tensor of a file, and the weights it fills.

    If it fills several, it holds them stacked along their outputs, in this order. Where a table has several entries
    that fill the same, that one counts which the file has; the first, if none.
    """

    name: str
    """In the file, without the family's prefix. `{head}` stands for the numbers of tensors of [D] that fill one of
    [H * D] together."""
    fills: tuple[str, ...]
    """Dotted names in the part's weights dataclass."""
    transposed: bool = False
    """Kept as [inputs, outputs]."""
    heads: Heads = Heads.TOGETHER
    reorder: Reorder | None = None
    experts: Experts | None = None
    """How the file keeps the experts of a layer; the other fields speak of one expert. None for what is no expert's."""
    one_row: bool = False
    """Whether numbers [N] are kept as a matrix of one row, [1, N]."""
    interleaved: bool = False
    """Whether the rows of an expert's several weights are interleaved: first of each, second of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ignorable:
    """Tensors that hold no weights, though files carry them."""

    name: str
    """Without the family's prefix; `{layer}` stands for every layer's number, `*` at the end for anything."""
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    embedding: tuple[Stored, ...]
    layer: tuple[Stored, ...]
    head: tuple[Stored, ...]
    layers: str
    """What the names of a layer's tensors begin with: `layers.{layer}.`."""
    ignorable: tuple[Ignorable, ...] = ()
    prefix: str = ""
    """Stands before most names of some files, and before none of others."""
    older_starts: tuple[tuple[str, str], ...] = ()
    """Starts of names, after the prefix, in older files, each with what they are called now."""
    older_ends: tuple[tuple[str, str], ...] = ()
    """Ends of names in older files, each with what they are called now."""


def tensor(name: str, fills: str) -> Stored:
    """One tensor by its full name.

    >>> tensor("wte.weight", "token_VW").fills
    ('token_VW',)
    """
    return Stored(name=name, fills=(fills,))


def linear(name: str, *fills: str, transposed: bool = False, reorder: Reorder | None = None) -> tuple[Stored, Stored]:
    """A linear map's weight and bias; of several maps, if the file has them in one.

    >>> [(each.name, each.fills) for each in linear("attn.c_proj", "attention.output")]
    [('attn.c_proj.weight', ('attention.output.weight_NI',)), ('attn.c_proj.bias', ('attention.output.bias_N',))]
    """
    weights, biases = (tuple(f"{each}.{kind}" for each in fills) for kind in ("weight_NI", "bias_N"))
    return (
        Stored(name=f"{name}.weight", fills=weights, transposed=transposed, reorder=reorder),
        Stored(name=f"{name}.bias", fills=biases, reorder=reorder),
    )


def experts(
    name: str,
    *fills: str,
    form: Experts = Experts.APART,
    transposed: bool = False,
    interleaved: bool = False,
    endings: tuple[str, str] = (".weight", ".bias"),
) -> tuple[Stored, Stored]:
    """Weights and biases of a linear map of every expert; `endings` of their names.

    >>> [(each.name, each.fills) for each in experts("experts.{expert}.w2", "mlp.experts.down")]
    [('experts.{expert}.w2.weight', ('mlp.experts.down.weight_ENI',)), \
('experts.{expert}.w2.bias', ('mlp.experts.down.bias_EN',))]
    """
    weights, biases = (tuple(f"{each}.{kind}" for each in fills) for kind in ("weight_ENI", "bias_EN"))
    return (
        Stored(name=name + endings[0], fills=weights, transposed=transposed, experts=form, interleaved=interleaved),
        Stored(name=name + endings[1], fills=biases, experts=form, interleaved=interleaved),
    )


STACKED_EXPERTS = (
    *experts("mlp.experts.gate_up_proj", *GATE_UP, form=Experts.STACKED, endings=("", "_bias")),
    *experts("mlp.experts.down_proj", "mlp.experts.down", form=Experts.STACKED, endings=("", "_bias")),
)
"""The form in which modules of transformers hold experts, whatever form their files have."""


def norm(name: str, fills: str, heads: Heads = Heads.TOGETHER) -> tuple[Stored, Stored]:
    """A norm's gain and bias; `heads` for norms of queries and keys."""
    return (
        Stored(name=f"{name}.weight", fills=(f"{fills}.gain_M",), heads=heads),
        Stored(name=f"{name}.bias", fills=(f"{fills}.bias_M",), heads=heads),
    )


def output(name: str) -> tuple[Stored, Stored]:
    """The head's matrix and bias."""
    return tensor(f"{name}.weight", "projection.weight_NI"), tensor(f"{name}.bias", "bias_V")


POSITION_IDS = Ignorable(name="embeddings.position_ids", why="0, 1, 2 and so on, kept as a buffer")


def masks(attention: str) -> tuple[Ignorable, Ignorable]:
    """What older files hold of each layer's attention besides its weights."""
    return (
        Ignorable(name=f"{attention}.bias", why="the causal mask, kept as a buffer; it follows from the config"),
        Ignorable(name=f"{attention}.masked_bias", why="the score that stood for minus infinity under that mask"),
    )


def frequencies(attention: str) -> Ignorable:
    """What older files hold of each layer's rotation."""
    return Ignorable(
        name=f"{attention}.rotary_emb.inv_freq",
        why="rotary frequencies, rounded to the file's dtype; they follow from the config",
    )
