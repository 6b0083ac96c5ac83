"""How many parameters a model has and how many bytes they take, by component, from its config alone.

Exact, not an estimate: for dense models the sums equal the number of elements of the weights that `validate_*` accepts,
so models too large for this machine can be sized on it. Tables that are computed rather than trained (rotary
frequencies) are not counted.

Shapes: M hidden, H query heads, K key/value heads, D head size, F intermediate, E experts, V vocabulary, P positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from .config import AttentionConfig, MlpConfig, ModelConfig, NormConfig, NormKind, Storage

FLOAT32_BYTES = 4


class Component(StrEnum):
    """The parts by which a model is counted."""

    EMBEDDING = "embedding"
    """Token table, and the position table where positions are learned."""
    ATTENTION = "attention"
    MLP = "mlp"
    """Dense MLPs: those of layers without a router."""
    EXPERTS = "experts"
    ROUTER = "router"
    NORMS = "norms"
    """Two in each layer and the final one."""
    HEAD = "head"
    """The output matrix; nothing where it is tied to the token table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """Elements of one component, split by how `Storage` treats them."""

    matrix: int = 0
    """Elements of matrices that are kept in the chosen storage."""
    rows: int = 0
    """Rows of those matrices: each has one float32 scale in int8 storage."""
    float32: int = 0
    """Elements that stay float32 in every storage: gains, biases, learned positions, routers."""

    @property
    def parameters(self) -> int:
        return self.matrix + self.float32

    def bytes(self, storage: Storage) -> int:
        """What the component takes in that storage, scales included, padding of packed words not."""
        element = {Storage.FLOAT32: 4, Storage.BFLOAT16: 2, Storage.INT8: 1}[storage]
        scales = self.rows if storage is Storage.INT8 else 0
        return element * self.matrix + FLOAT32_BYTES * (scales + self.float32)

    def __add__(self, other: "Count") -> "Count":
        return Count(
            matrix=self.matrix + other.matrix, rows=self.rows + other.rows, float32=self.float32 + other.float32
        )

    def __rmul__(self, times: int) -> "Count":
        return Count(matrix=times * self.matrix, rows=times * self.rows, float32=times * self.float32)


def count(config: ModelConfig) -> dict[Component, Count]:
    """Every component's count, in the enum's order; a component that the model lacks counts nothing."""
    counts = {component: Count() for component in Component}
    for component, part in _parts(config):
        counts[component] += part
    return counts


def total(config: ModelConfig) -> Count:
    """All components together."""
    return sum(count(config).values(), Count())


def cache_bytes_per_token(config: ModelConfig, element: int = FLOAT32_BYTES) -> int:
    """What one token of one sequence takes in the key/value cache of all layers, without regard to windows."""
    return sum(2 * layer.attention.kv_heads * layer.attention.head_size * element for layer in config.layers)


def _parts(config: ModelConfig) -> Iterator[tuple[Component, Count]]:
    hidden, vocabulary = config.hidden, config.vocabulary
    positions = config.context * hidden if config.learned_positions else 0
    yield Component.EMBEDDING, _linear(vocabulary, hidden) + Count(float32=positions)
    for layer in config.layers:
        yield Component.ATTENTION, _attention(layer.attention, hidden)
        yield Component.NORMS, 2 * _norm(layer.norm, hidden)
        if layer.mlp.experts == 1:
            yield Component.MLP, _mlp(layer.mlp, hidden)
        else:
            yield Component.EXPERTS, layer.mlp.experts * _mlp(layer.mlp, hidden)
            yield Component.ROUTER, Count(float32=hidden * layer.mlp.experts)
    yield Component.NORMS, _norm(config.final_norm, hidden)
    if not config.tied_head:
        yield Component.HEAD, _linear(vocabulary, hidden)


def _attention(config: AttentionConfig, hidden: int) -> Count:
    """Query and output are H * D by M, key and value K * D by M."""
    query, key = config.heads * config.head_size, config.kv_heads * config.head_size
    return (
        _linear(query, hidden, bias=config.qkv_bias)
        + 2 * _linear(key, hidden, bias=config.qkv_bias)
        + _linear(hidden, query, bias=config.output_bias)
    )


def _mlp(config: MlpConfig, hidden: int) -> Count:
    """One expert: up, gate where there is one, and down."""
    inward = 2 if config.gated else 1
    return inward * _linear(config.width, hidden, bias=config.bias) + _linear(hidden, config.width, bias=config.bias)


def _norm(config: NormConfig, hidden: int) -> Count:
    return Count(float32=hidden * (2 if config.kind is NormKind.LAYER else 1))


def _linear(outputs: int, inputs: int, *, bias: bool = False) -> Count:
    return Count(matrix=outputs * inputs, rows=outputs, float32=outputs if bias else 0)
