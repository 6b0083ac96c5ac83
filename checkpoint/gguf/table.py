"""Names of tensors in GGUF files: the same in every architecture.

What an architecture leaves open (one tensor of queries, keys and values or three, and which norms there are) is told
by what the file holds.
"""

from collections.abc import Collection

from ...spec.config import NormPlacement
from ..permutation import key_rows, query_rows
from ..table import QKV, Heads, Stored, Table, linear, norm, output, tensor
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


def layer_norms(architecture: Architecture, names: Collection[str]) -> dict[str, str]:
    return TWO_NORMS if "blk.0.attn_norm_2.weight" in names else NORMS[architecture.placement]


def table(architecture: Architecture, names: Collection[str]) -> Table:
    """The table for a file that holds tensors of these names."""
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
        ),
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
