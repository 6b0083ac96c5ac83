"""GLM 4.5: first layers dense, then experts by sigmoid, chosen with a bias and by groups, beside a shared MLP.

Published files hold one layer more, which guesses tokens further ahead and is of no use for plain generation.
"""

from dataclasses import replace

from ...spec.config import MlpConfig
from ...spec.moe import MoeConfig, RouterConfig, Score
from ..family import Family, ParsedConfig, rms_norm
from ..fields import Fields
from ..llama_like import GATED_MLP, INPUT_NORMS, SPLIT_QKV, layer_count, read, table
from ..moe_fields import ROUTER_AND_EXPERTS, ROUTER_TRAINING, SHARED_EXPERTS, further_layers
from ..table import Heads, linear, norm, tensor


def chosen_by_sigmoid(config: Fields) -> RouterConfig:
    """The router: a sigmoid of each logit, a bias for the choice, groups, and weights that are scaled."""
    return RouterConfig(
        experts=config.integer("n_routed_experts", 128),
        top_k=config.integer("num_experts_per_tok", 8),
        score=Score.SIGMOID,
        renormalize=config.flag("norm_topk_prob", True),
        scale=config.number("routed_scaling_factor", 1.0),
        choice_bias=True,
        groups=config.integer("n_group", 1),
        kept_groups=config.integer("topk_group", 1),
    )


def _read(config: Fields) -> ParsedConfig:
    chooses = chosen_by_sigmoid(config)
    first = config.integer("first_k_dense_replace", 1, least=0)
    width, shared = config.integer("moe_intermediate_size", 1408), config.integer("n_shared_experts", 1)
    own_norm = rms_norm(config, default=1e-5)
    config.ignore(("num_mtp_layers",))
    beyond = further_layers(config, layer_count(config))

    def feed(index: int, plain: MlpConfig) -> MlpConfig | MoeConfig:
        if index < first:
            return plain
        expert = replace(plain, width=width)
        return MoeConfig(router=chooses, expert=expert, shared=replace(plain, width=width * shared))

    parsed = read(
        config,
        norm=own_norm,
        part=0.5,
        attention={
            "qkv_bias": config.flag("attention_bias", False),
            "qk_norm": own_norm if config.flag("use_qk_norm", False) else None,
        },
        feed=feed,
    )
    return replace(parsed, table=replace(TABLE, ignorable=(*TABLE.ignorable, *beyond)))


TABLE = table(
    *INPUT_NORMS,
    *SPLIT_QKV,
    *norm("self_attn.q_norm", "attention.query_norm", Heads.SHARED),
    *norm("self_attn.k_norm", "attention.key_norm", Heads.SHARED),
    *linear("self_attn.o_proj", "attention.output"),
    *GATED_MLP,
    *ROUTER_AND_EXPERTS,
    tensor("mlp.gate.e_score_correction_bias", "mlp.choice_bias_E"),
    *SHARED_EXPERTS,
)

GLM4_MOE = Family(
    model_type="glm4_moe",
    architectures=("Glm4MoeForCausalLM", "Glm4MoeModel"),
    read=_read,
    table=TABLE,
    ignored=ROUTER_TRAINING,
)
