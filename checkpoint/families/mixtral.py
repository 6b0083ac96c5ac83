"""Mixtral: Mistral's attention, and 2 of 8 experts, weighed by a softmax over the two."""

from ...spec.config import MlpConfig
from ...spec.moe import MoeConfig, router
from ..family import Family, ParsedConfig, rms_norm
from ..fields import Fields
from ..llama_like import INPUT_NORMS, SPLIT_QKV, read, table
from ..moe_fields import GATE, ROUTER_TRAINING, UP
from ..table import STACKED_EXPERTS, experts, linear


def _read(config: Fields) -> ParsedConfig:
    chooses = router(
        "mixtral", experts=config.integer("num_local_experts", 8), top_k=config.integer("num_experts_per_tok", 2)
    )

    def feed(index: int, plain: MlpConfig) -> MoeConfig:
        return MoeConfig(router=chooses, expert=plain)

    return read(
        config,
        norm=rms_norm(config, default=1e-5),
        base=1e6,
        windows=config.optional_integer("sliding_window", None),
        feed=feed,
    )


MIXTRAL = Family(
    model_type="mixtral",
    architectures=("MixtralForCausalLM", "MixtralModel"),
    read=_read,
    table=table(
        *INPUT_NORMS,
        *SPLIT_QKV,
        *linear("self_attn.o_proj", "attention.output"),
        *linear("block_sparse_moe.gate", "mlp.router"),
        *linear("mlp.gate", "mlp.router"),
        *experts("block_sparse_moe.experts.{expert}.w1", GATE),
        *experts("block_sparse_moe.experts.{expert}.w3", UP),
        *experts("block_sparse_moe.experts.{expert}.w2", "mlp.experts.down"),
        *STACKED_EXPERTS,
    ),
    ignored=ROUTER_TRAINING,
)
