"""MPT: layer norms without bias, ALiBi instead of positions, merged query-key-value projection, plain MLPs, tied head.

What its first code knows beyond that (learned or rotary positions, shared keys, normed queries, biases, scaled logits)
no published model has; transformers reads some of it and computes something else.
"""

from ...spec.config import Activation, AttentionConfig, LayerConfig, MlpConfig, ModelConfig
from .. import alibi
from ..family import Family, Understood, common, context, head, head_size, layer_norm
from ..fields import MOST_LAYERS, Fields
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


def _read(config: Fields) -> Understood:
    hidden, heads = config.integer("d_model"), config.integer("n_heads")
    size = head_size(config, hidden, heads)
    inner = config.section("attn_config") or Fields({}, f"{config.where}attn_config.")
    common(inner)
    inner.ignore(("attn_impl", "attn_pdrop", "tie_word_embeddings"))  # kernels, training, and the outer field's copy
    inner.only("alibi", True)
    inner.only("attn_type", "multihead_attention")
    for name in ("prefix_lm", "qk_ln", "attn_uses_sequence_id"):
        inner.only(name, False)
    attention = AttentionConfig(
        heads=heads,
        kv_heads=heads,
        head_size=size,
        scale=inner.number("softmax_scale", size**-0.5),
        alibi=True,
        qkv_clip=inner.optional_number("clip_qkv"),
    )
    slope_H = alibi.slopes(heads, inner.number("alibi_bias_max", 8.0))
    inner.finish()
    config.only("norm_type", "low_precision_layernorm", "layernorm")
    config.only("no_bias", True)
    config.only("logit_scale", None)
    norm = layer_norm(config, "layer_norm_epsilon", bias=False)
    width = hidden * config.integer("expansion_ratio", 4)
    mlp = MlpConfig(width=width, activation=Activation.GELU, gated=False)
    model = ModelConfig(
        family="mpt",
        hidden=hidden,
        vocabulary=config.integer("vocab_size"),
        context=context(config, "max_seq_len"),
        layers=(LayerConfig(norm=norm, attention=attention, mlp=mlp),) * config.integer("n_layers", most=MOST_LAYERS),
        final_norm=norm,
        learned_positions=False,
        head=head(config, tied=True),
    )
    return Understood(config=model, slope_H=slope_H)


MPT = Family(
    model_type="mpt",
    architectures=("MptForCausalLM", "MptModel", "MPTForCausalLM", "MPTModel"),
    read=_read,
    table=TABLE,
    harmless={
        "learned_pos_emb": "where there is ALiBi, which is required here, none are made",
        "embedding_fraction": "scales a gradient",
        **dict.fromkeys(("init_device", "init_config", "verbose"), "training"),
        "tokenizer_name": "the tokenizer is read from its own file",
    },
    remote_code=("configuration_mpt", "modeling_mpt"),
)
