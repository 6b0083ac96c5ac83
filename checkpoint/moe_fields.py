"""Names of tensors that families with experts share, and fields that say nothing about inference."""

from .fields import MOST_LAYERS, Fields
from .table import GATE_UP, STACKED_EXPERTS, Ignorable, Stored, experts, linear

GATE, UP = GATE_UP

ROUTER_TRAINING = {
    "output_router_logits": "what the library returns",
    "router_aux_loss_coef": "training: a loss that evens out the experts' tokens",
    "router_jitter_noise": "training: noise on what the router reads",
}
"""Fields of routers that leave the logits unchanged, each with why."""

ROUTER_AND_EXPERTS: tuple[Stored, ...] = (
    *linear("mlp.gate", "mlp.router"),
    *experts("mlp.experts.{expert}.gate_proj", GATE),
    *experts("mlp.experts.{expert}.up_proj", UP),
    *experts("mlp.experts.{expert}.down_proj", "mlp.experts.down"),
    *STACKED_EXPERTS,
)
"""As Qwen's files name them, and most after it."""

SHARED_EXPERTS: tuple[Stored, ...] = (
    *linear("mlp.shared_experts.gate_proj", "mlp.shared.gate"),
    *linear("mlp.shared_experts.up_proj", "mlp.shared.up"),
    *linear("mlp.shared_experts.down_proj", "mlp.shared.down"),
)
"""The MLP beside the experts, as GLM's files name it."""


def further_layers(config: Fields, layers: int) -> tuple[Ignorable, ...]:
    """Return what files hold after the last layer: `num_nextn_predict_layers` that guess tokens further ahead."""
    count = config.integer("num_nextn_predict_layers", 0, least=0, most=MOST_LAYERS)
    return tuple(
        Ignorable(name=f"layers.{layers + each}.*", why="guesses tokens further ahead") for each in range(count)
    )
