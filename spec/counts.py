"""How many parameters a model has and how many bytes they take, by component, from its config alone.

Exact, not an estimate: for dense models the sums equal the number of elements of the weights that `validate_*` accepts,
so models too large for this machine can be sized on it. Tables that are computed rather than trained (rotary
frequencies) are not counted. Gains of queries and keys that all heads share count once for each head, as they are held.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from .config import INT4_GROUP, ModelConfig, Storage
from .shapes import Shapes, embedding_shapes, head_shapes, is_matrix, layer_shapes, trained

FLOAT32_BYTES = 4


class Component(StrEnum):
    """The parts by which a model is counted."""

    EMBEDDING = "embedding"
    """Token table with its projection, and the tables of learned positions and token types."""
    ATTENTION = "attention"
    MLP = "mlp"
    """MLPs that serve every token: dense ones, and those beside experts."""
    EXPERTS = "experts"
    ROUTER = "router"
    """Routers with their biases, and what weighs the MLPs beside experts."""
    NORMS = "norms"
    """Of layers, of queries and keys, of the embedding, and the final one."""
    HEAD = "head"
    """The output matrix, unless it is the token table; its bias, and the reduction before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """Elements of one component, split by how `Storage` treats them."""

    matrix: int = 0
    """Elements of matrices that are kept in the chosen storage."""
    rows: int = 0
    """Rows of those matrices: each has one float32 scale in int8 storage."""
    groups: int = 0
    """Groups of those rows: each has a float32 step and a float32 lowest value in int4 storage."""
    float32: int = 0
    """Elements that stay float32 in every storage: gains, biases, learned positions, routers."""

    @property
    def parameters(self) -> int:
        return self.matrix + self.float32

    def bytes(self, storage: Storage) -> int:
        """What the component takes in that storage, scales included, padding of packed words not."""
        bits = {Storage.FLOAT32: 32, Storage.BFLOAT16: 16, Storage.INT8: 8, Storage.INT4: 4}[storage]
        scales = {Storage.INT8: self.rows, Storage.INT4: 2 * self.groups}.get(storage, 0)
        return -(-bits * self.matrix // 8) + FLOAT32_BYTES * (scales + self.float32)

    def __add__(self, other: "Count") -> "Count":
        return Count(
            matrix=self.matrix + other.matrix,
            rows=self.rows + other.rows,
            groups=self.groups + other.groups,
            float32=self.float32 + other.float32,
        )

    def __rmul__(self, times: int) -> "Count":
        return Count(
            matrix=times * self.matrix,
            rows=times * self.rows,
            groups=times * self.groups,
            float32=times * self.float32,
        )


def count(config: ModelConfig) -> dict[Component, Count]:
    """Every component's count, in the enum's order; a component that the model lacks counts nothing."""
    counts = {component: Count() for component in Component}
    for component, part in _parts(config):
        counts[component] += part
    return counts


def total(config: ModelConfig) -> Count:
    """All components together."""
    return sum(count(config).values(), Count())


def count_of(shapes: Shapes) -> Count:
    """Return the count of those of the tensors that are trained."""
    return sum((_of_tensor(name, shape) for name, shape in trained(shapes).items()), Count())


def cache_bytes_per_token(config: ModelConfig, element: int = FLOAT32_BYTES) -> int:
    """What one token of one sequence takes in the key/value cache of all layers, without regard to windows."""
    return sum(2 * layer.attention.kv_heads * layer.attention.head_size * element for layer in config.layers)


_OF_MIXTURE = {
    "experts": Component.EXPERTS,
    **dict.fromkeys(("router", "choice_bias_E", "shared_gate", "coefficient"), Component.ROUTER),
}


def _parts(config: ModelConfig) -> Iterator[tuple[Component, Count]]:
    yield from _counted(embedding_shapes(config), Component.EMBEDDING)
    for layer in config.layers:
        yield from _counted(layer_shapes(layer, config.hidden), Component.MLP)
    yield from _counted(head_shapes(config), Component.HEAD)


def _counted(shapes: Shapes, other: Component) -> Iterator[tuple[Component, Count]]:
    """Each trained tensor's count, by component; what is neither a norm nor attention belongs to `other`."""
    for name, shape in trained(shapes).items():
        parts = name.split(".")
        component = Component.ATTENTION if parts[0] == "attention" else other
        if parts[0] == "mlp":
            component = _OF_MIXTURE.get(parts[1], other)
        yield Component.NORMS if any(part.endswith("norm") for part in parts) else component, _of_tensor(name, shape)


def _of_tensor(name: str, shape: tuple[int, ...]) -> Count:
    if not is_matrix(name):
        return Count(float32=math.prod(shape))
    *stack, inputs = shape
    rows = math.prod(stack)
    return Count(matrix=rows * inputs, rows=rows, groups=rows * -(-inputs // INT4_GROUP))
