"""Hunyuan's mixtures: LLaMA's, with queries and keys normalized after they rotate, and experts beside a shared MLP.

`moe_topk` and the widths may be lists with a number for each layer; here all layers must be alike, as in what was
published. The rotary type that files call dynamic does not depend on the length where it has an `alpha`: the base
is multiplied by alpha^(D / (D - 2)), D elements a head.
"""

from dataclasses import replace
from typing import Any

from ...spec.config import MlpConfig
from ...spec.moe import MoeConfig, router
from ..family import Family, ParsedConfig, rms_norm
from ..fields import Fields
from ..llama_like import INPUT_NORMS, SPLIT_QKV, head_size_of, read, table
from ..moe_fields import ROUTER_AND_EXPERTS, ROUTER_TRAINING
from ..table import Heads, linear, norm

_REQUIRED = {
    "norm_topk_prob": True,
    "use_mixed_mlp_moe": True,
    "use_qk_norm": True,
    "use_rotary_pos_emb": True,
    "norm_type": "rms",
    **dict.fromkeys(["mlp_bias", "use_cla", "use_mla", "moe_layer_num_skipped", "group_limited_greedy"], False),
    **dict.fromkeys(["moe_drop_tokens", "add_classification_head"], False),
}
"""Fields of the code that trained the models, each with the one value that is computed."""


def _read(config: Fields) -> ParsedConfig:
    size = head_size_of(config)
    config.only("attention_head_dim", None, size)
    for name, computed in _REQUIRED.items():
        config.only(name, computed, None)
    _stretch_base(config, size)
    own_norm = rms_norm(config, default=1e-5)
    bias = config.flag("attention_bias", False)
    chooses = router("qwen3-moe", experts=_of_every_layer(config, "num_experts", 1), top_k=_chosen(config))
    width = config.integer("intermediate_size", 11008)
    expert_width = _of_every_layer(config, "moe_intermediate_size", width)
    shared = _of_every_layer(config, "num_shared_expert", 1)

    def feed(index: int, plain: MlpConfig) -> MoeConfig:
        return MoeConfig(
            router=chooses,
            expert=replace(plain, width=expert_width),
            shared=replace(plain, width=width * shared),
        )

    return read(
        config,
        norm=own_norm,
        attention={"qkv_bias": bias, "output_bias": bias, "qk_norm": own_norm, "qk_norm_rotated": True},
        feed=feed,
    )


def _chosen(config: Fields) -> int:
    config.only("num_experts_per_tok", None, config.values.get("moe_topk"))
    return _of_every_layer(config, "moe_topk", 1)


def _of_every_layer(config: Fields, name: str, usual: int) -> int:
    """Return a number that all layers share; raises `ConfigError` where a list holds several."""
    numbers = config.integers(name, least=1) or [usual]
    if len(set(numbers)) > 1:
        raise config.wrong(name, "the same number for every layer")
    return numbers[0]


def _stretch_base(config: Fields, size: int) -> None:
    """Put the base that an alpha means into the place of both."""
    for section in ("rope_scaling", "rope_parameters"):
        scaling = config.values.get(section)
        if not isinstance(scaling, dict) or "alpha" not in scaling:
            continue
        given = Fields(scaling, f"{config.where}{section}.")
        kinds: dict[str, Any] = {"dynamic": None}
        given.choice("rope_type", kinds, given.choice("type", kinds, "dynamic") or "dynamic")
        base = given.number("rope_theta", config.number("rope_theta", 10000.0))
        stretched = base * given.number("alpha") ** (size / (size - 2))
        given.only("factor", 1.0, 1, None)
        given.ignore(("beta_fast", "beta_slow", "mscale", "mscale_all_dim"))  # of YaRN; here nothing reads them
        given.finish()
        config.values = {**config.values, section: {"rope_type": "default", "rope_theta": stretched}}


HUNYUAN_MOE = Family(
    model_type="hunyuan_v1_moe",
    architectures=("HunYuanMoEV1ForCausalLM", "HunYuanMoEV1Model"),
    read=_read,
    table=table(
        *INPUT_NORMS,
        *SPLIT_QKV,
        *norm("self_attn.query_layernorm", "attention.query_norm", Heads.SHARED),
        *norm("self_attn.key_layernorm", "attention.key_norm", Heads.SHARED),
        *linear("self_attn.o_proj", "attention.output"),
        *linear("mlp.gate.wg", "mlp.router"),
        *ROUTER_AND_EXPERTS,
        *linear("mlp.shared_mlp.gate_proj", "mlp.shared.gate"),
        *linear("mlp.shared_mlp.up_proj", "mlp.shared.up"),
        *linear("mlp.shared_mlp.down_proj", "mlp.shared.down"),
    ),
    ignored={
        **ROUTER_TRAINING,
        "moe_random_routing_dropped_token": "training: what becomes of tokens over an expert's capacity",
        "cla_share_factor": "counts with use_cla only, which is refused",
        "dense_list": "sizes of a head that is no part of a language model",
        "class_num": "of a classifier",
        "pool_type": "of a classifier",
        "eod_token_id": "tokens by role",
        "im_start_id": "tokens by role",
        "im_end_id": "tokens by role",
        "org_vocab_size": "the tokens before the table was padded",
    },
    remote_code=("configuration_hunyuan", "modeling_hunyuan", "hunyuan"),
)
