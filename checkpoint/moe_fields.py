"""Names of tensors that families with experts share, and fields that say nothing about inference."""

from .table import GATE_UP, STACKED_EXPERTS, Stored, experts, linear

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
