"""Names of tensors in GGUF files: the same in every architecture.

What an architecture leaves open (one tensor of queries, keys and values or three, and which norms there are) is told
by what the file holds.
"""

from collections.abc import Collection

from ...spec.config import NormPlacement
from ..permutation import key_rows, query_rows
from ..table import GATE_UP, QKV, Experts, Heads, Ignorable, Stored, Table, experts, linear, norm, output, tensor
from .architectures import Architecture

NORMS = {
    NormPlacement.PRE_NORM: {"attn_norm": "attention_norm", "ffn_norm": "mlp_norm"},
    NormPlacement.SANDWICH_NORM: {
        "attn_norm": "attention_norm",
        "post_attention_norm": "attention_output_norm",
        "ffn_norm": "mlp_norm",
        "post_ffw_norm": "mlp_output_norm",
    },
    NormPlacement.OUTPUT_NORM: {"post_attention_norm": "attention_output_norm", "post_ffw_norm": "mlp_output_norm"},
    NormPlacement.POST_NORM: {"attn_output_norm": "attention_output_norm", "layer_output_norm": "mlp_output_norm"},
}
"""What the norms of a layer fill, by where they stand."""

TWO_NORMS = {"attn_norm_2": "attention_norm", "attn_norm": "mlp_norm"}
"""Before attention and MLP, where both read the same: Falcon-40B."""

FUSED = linear("attn_qkv", *QKV)

EXPERTS = (
    *linear("ffn_gate_inp", "mlp.router"),
    tensor("exp_probs_b.bias", "mlp.choice_bias_E"),
    *experts("ffn_gate_exps", GATE_UP[0], form=Experts.STACKED),
    *experts("ffn_up_exps", GATE_UP[1], form=Experts.STACKED),
    *experts("ffn_down_exps", "mlp.experts.down", form=Experts.STACKED),
    *experts("ffn_gate_up_exps", *GATE_UP, form=Experts.STACKED),
    *experts("ffn_gate.{expert}", GATE_UP[0]),
    *experts("ffn_up.{expert}", GATE_UP[1]),
    *experts("ffn_down.{expert}", "mlp.experts.down"),
    *linear("ffn_gate_shexp", "mlp.shared.gate"),
    *linear("ffn_up_shexp", "mlp.shared.up"),
    *linear("ffn_down_shexp", "mlp.shared.down"),
    *linear("ffn_gate_inp_shexp", "mlp.shared_gate"),
)
"""Experts stacked, as converters write them since 2024, with gate and up apart or together; one by one before."""


def layer_norms(architecture: Architecture, names: Collection[str]) -> dict[str, str]:
    if "blk.0.attn_norm_2.weight" in names:
        return TWO_NORMS
    placed = NORMS[architecture.placement]
    return {architecture.mlp_norm if name == "ffn_norm" else name: fills for name, fills in placed.items()}


def table(architecture: Architecture, names: Collection[str], further: Collection[int] = ()) -> Table:
    """The table for a file that holds tensors of these names, with the numbers of layers that are of no use."""
    return Table(
        layers="blk.{layer}.",
        embedding=(
            tensor("token_embd.weight", "token_VW"),
            tensor("position_embd.weight", "position_PM"),
            tensor("token_types.weight", "type_YM"),
            *norm("token_embd_norm", "norm"),
        ),
        layer=(
            *(entry for name, fills in layer_norms(architecture, names).items() for entry in norm(name, fills)),
            *_projections(architecture, names),
            *norm("attn_q_norm", "attention.query_norm", architecture.qk_norm or Heads.TOGETHER),
            *norm("attn_k_norm", "attention.key_norm", architecture.qk_norm or Heads.TOGETHER),
            *linear("attn_output", "attention.output"),
            *linear("ffn_up", *(("mlp.gate", "mlp.up") if architecture.gate_in_up else ("mlp.up",))),
            *(() if architecture.gate_in_up else linear("ffn_gate", "mlp.gate")),
            *linear("ffn_down", "mlp.down"),
            *(() if architecture.experts is None else EXPERTS),
            tensor("attn_sinks.weight", "attention.sink_H"),
        ),
        ignorable=tuple(Ignorable(name=f"blk.{layer}.*", why="guesses tokens further ahead") for layer in further),
        head=(*norm("output_norm", "norm"), *output("output")),
    )


def _projections(architecture: Architecture, names: Collection[str]) -> tuple[Stored, ...]:
    if "blk.0.attn_qkv.weight" in names and not architecture.permuted:
        return FUSED
    return (
        *linear("attn_q", "attention.query", reorder=query_rows if architecture.permuted else None),
        *linear("attn_k", "attention.key", reorder=key_rows if architecture.permuted else None),
        *linear("attn_v", "attention.value"),
    )
