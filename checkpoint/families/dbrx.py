"""DBRX: layer norms without bias, queries, keys and values merged and cut, and experts kept as one matrix."""

from ...spec.config import AttentionConfig, LayerConfig, MlpConfig, ModelConfig, NormConfig, NormKind
from ...spec.moe import MoeConfig, router
from .. import rotary_fields
from ..family import ACTIVATIONS, Family, ParsedConfig, head, head_size
from ..fields import MOST_LAYERS, Fields
from ..moe_fields import GATE, UP
from ..table import QKV, Experts, Table, experts, linear, norm, output, tensor

EXPERTS = "ffn.experts.mlp"
WHOLE = ("", ".bias")


def _read(config: Fields) -> ParsedConfig:
    hidden, heads = config.integer("d_model", 2048), config.integer("n_heads", 16)
    layers, context = config.integer("n_layers", 24, most=MOST_LAYERS), config.integer("max_seq_len", 2048)
    for name, computed in (("hidden_size", hidden), ("num_attention_heads", heads), ("num_hidden_layers", layers)):
        config.only(name, None, computed)
    config.only("max_position_embeddings", None, context)
    size = head_size(config, hidden, heads)
    attention = _section(config, "attn_config")
    feed = _section(config, "ffn_config")
    kv_heads = attention.integer("kv_n_heads", 1)
    config.only("num_key_value_heads", None, kv_heads)
    clip = attention.optional_number("clip_qkv")
    base = attention.number("rope_theta", 10000.0)
    attention.ignore(("attn_pdrop",))
    attention.finish()
    rotation = rotary_fields.rotation(config, rotary_fields.Head(size=size, context=context, base=base))
    own_norm = NormConfig(kind=NormKind.LAYER, epsilon=1e-5, bias=False)
    layer = LayerConfig(
        norm=own_norm,
        attention=AttentionConfig(
            heads=heads,
            kv_heads=kv_heads,
            head_size=size,
            scale=size**-0.5,
            qkv_clip=clip,
            rotary=rotation.config,
        ),
        mlp=_experts(feed, hidden),
    )
    model = ModelConfig(
        family="dbrx",
        hidden=hidden,
        vocabulary=config.integer("vocab_size", 32000),
        context=context,
        layers=(layer,) * layers,
        final_norm=own_norm,
        learned_positions=False,
        head=head(config, tied=False),
    )
    return ParsedConfig(config=model, rotations=(rotation,) * layers)


def _experts(feed: Fields, hidden: int) -> MoeConfig:
    feed.only("hidden_size", None, hidden)
    feed.only("moe_normalize_expert_weights", 1.0, None)  # other norms than the sum of absolute values divide otherwise
    renormalized = feed.values.get("moe_normalize_expert_weights", 1.0) is not None
    feed.ignore(("moe_jitter_eps", "moe_loss_weight", "uniform_expert_assignment"))
    activation = feed.section("ffn_act_fn") or Fields({}, feed.where)
    mlp = MlpConfig(
        width=feed.integer("ffn_hidden_size", 3584),
        activation=activation.choice("name", ACTIVATIONS, "silu"),
        gated=True,
    )
    activation.finish()
    chooses = router(
        "qwen3-moe" if renormalized else "qwen2-moe",
        experts=feed.integer("moe_num_experts", 4),
        top_k=feed.integer("moe_top_k", 1),
    )
    feed.finish()
    return MoeConfig(router=chooses, expert=mlp)


def _section(config: Fields, name: str) -> Fields:
    """One of the two sections that hold most fields, without those that every config class writes."""
    section = config.section(name) or Fields({}, f"{config.where}{name}.")
    section.ignore(("model_type", "transformers_version", "architectures", "torch_dtype", "dtype", "_name_or_path"))
    section.ignore(("output_hidden_states", "return_dict", "output_attentions", "chunk_size_feed_forward"))
    section.ignore(("id2label", "label2id", "problem_type", "is_encoder_decoder", "initializer_range"))
    return section


DBRX = Family(
    model_type="dbrx",
    architectures=("DbrxForCausalLM", "DbrxModel"),
    read=_read,
    table=Table(
        prefix="transformer.",
        layers="blocks.{layer}.",
        embedding=(tensor("wte.weight", "token_VW"),),
        layer=(
            *norm("norm_attn_norm.norm_1", "attention_norm"),
            *norm("norm_attn_norm.norm_2", "mlp_norm"),
            *linear("norm_attn_norm.attn.Wqkv", *QKV),
            *linear("norm_attn_norm.attn.out_proj", "attention.output"),
            *linear("ffn.router.layer", "mlp.router"),
            *experts(f"{EXPERTS}.w1", GATE, form=Experts.FLAT, endings=WHOLE),
            *experts(f"{EXPERTS}.v1", UP, form=Experts.FLAT, endings=WHOLE),
            *experts(f"{EXPERTS}.w2", "mlp.experts.down", form=Experts.FLAT, transposed=True, endings=WHOLE),
        ),
        head=(*norm("norm_f", "norm"), *output("lm_head")),
    ),
    ignored={
        "output_router_logits": "what the library returns",
        "router_aux_loss_coef": "training",
    },
    remote_code=("configuration_dbrx", "modeling_dbrx"),
)
