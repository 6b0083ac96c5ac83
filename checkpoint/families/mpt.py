"""MPT: layer norms without bias, ALiBi instead of positions, merged query-key-value projection, plain MLPs, tied head.

What its first code knows beyond that (learned or rotary positions, shared keys, normed queries, biases, scaled logits)
no published model has; transformers reads some of it and computes something else.
"""

from dataclasses import replace

from ...spec.config import Activation, LayerConfig, MlpConfig
from .. import alibi
from ..family import Family, ParsedConfig, alias, common, layer_norm
from ..fields import Fields
from ..gpt_like import layer_count, model, multi_head
from ..table import QKV, Table, linear, norm, output, tensor

TABLE = Table(
    prefix="transformer.",
    layers="blocks.{layer}.",
    embedding=(tensor("wte.weight", "token_VE"),),
    layer=(
        *norm("norm_1", "attention_norm"),
        *linear("attn.Wqkv", *QKV),
        *linear("attn.out_proj", "attention.output"),
        *norm("norm_2", "mlp_norm"),
        *linear("ffn.up_proj", "mlp.up"),
        *linear("ffn.down_proj", "mlp.down"),
    ),
    head=(*norm("norm_f", "norm"), *output("lm_head")),
)


def _read(config: Fields) -> ParsedConfig:
    hidden, heads = config.integer("d_model"), config.integer("n_heads")
    inner = config.section("attn_config") or Fields({}, f"{config.where}attn_config.")
    common(inner)
    inner.ignore(("attn_impl", "attn_pdrop", "tie_word_embeddings"))  # kernels, training, and the outer field's copy
    inner.ignore(("rope_theta", "rope_impl", "rope_dail_config", "rope_hf_config"))  # count with rope, which is refused
    for name, computed in ATTENTION_ONLY.items():
        inner.only(name, computed)
    inner.only("kv_n_heads", None, heads)
    clip, most = inner.optional_number("clip_qkv"), inner.number("alibi_bias_max", 8.0)
    attention = multi_head(config, hidden, heads, bias=False, alibi=True, qkv_clip=clip)
    attention = replace(attention, scale=inner.number("softmax_scale", attention.scale))
    inner.finish()
    config.only("norm_type", "low_precision_layernorm", "layernorm")
    config.only("no_bias", True)
    for name in ("logit_scale", "final_logit_softcapping", "block_overrides"):
        config.only(name, None)
    layer = LayerConfig(
        norm=layer_norm(config, alias(config, "layer_norm_epsilon", "norm_eps"), bias=False),
        attention=attention,
        mlp=MlpConfig(width=_width(config, hidden), activation=Activation.GELU, gated=False),
    )
    layers = (layer,) * layer_count(config, "n_layers")
    parsed = model(config, "mpt", hidden, layers, context=config.integer("max_seq_len"))
    return ParsedConfig(config=parsed, slopes=lambda: alibi.slopes(heads, most))


def _width(config: Fields, hidden: int) -> int:
    """Of the MLPs, by either of the fields that say so."""
    width, plain = hidden * config.integer("expansion_ratio", 4), ("torch", {"name": "torch"})
    config.only("fc_type", *plain)
    if inner := config.section("ffn_config"):
        inner.only("ffn_type", "mptmlp")
        inner.only("fc_type", *plain)
        inner.only("ffn_act_fn", None, {"name": "gelu"}, {"name": "gelu", "approximate": "none"})
        width = inner.integer("ffn_hidden_size", width)
        inner.finish()
    return width


ATTENTION_ONLY = {
    "alibi": True,
    "attn_type": "multihead_attention",
    "fused_qkv": True,
    "sliding_window_size": -1,
    "attn_logit_softcapping": None,
    **dict.fromkeys(("prefix_lm", "qk_ln", "qk_gn", "attn_uses_sequence_id", "rope"), False),
}
"""Of `attn_config`, what changes results, each with the one value that is computed."""

MPT = Family(
    model_type="mpt",
    architectures=("MptForCausalLM", "MptModel", "MPTForCausalLM", "MPTModel"),
    read=_read,
    table=TABLE,
    ignored={
        "learned_pos_emb": "where there is ALiBi, which is required here, none are made",
        "embedding_fraction": "scales a gradient",
        **dict.fromkeys(("init_device", "init_config", "verbose"), "training"),
        "tokenizer_name": "the tokenizer is read from its own file",
        "use_pad_tok_in_ffn": "no token is padding here",
    },
    remote_code=("configuration_mpt", "modeling_mpt"),
)
