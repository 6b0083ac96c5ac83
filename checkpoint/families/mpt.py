"""MPT: layer norms without bias, ALiBi instead of positions, merged query-key-value projection, plain MLPs, tied head.

What its first code knows beyond that (learned or rotary positions, shared keys, normed queries, biases, scaled logits)
no published model has; transformers reads some of it and computes something else.
"""

from dataclasses import replace

from ...spec.config import Activation, LayerConfig, MlpConfig
from .. import alibi
from ..family import Family, Understood, common, layer_norm
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


def _read(config: Fields) -> Understood:
    hidden, heads = config.integer("d_model"), config.integer("n_heads")
    inner = config.section("attn_config") or Fields({}, f"{config.where}attn_config.")
    common(inner)
    inner.ignore(("attn_impl", "attn_pdrop", "tie_word_embeddings"))  # kernels, training, and the outer field's copy
    inner.only("alibi", True)
    inner.only("attn_type", "multihead_attention")
    for name in ("prefix_lm", "qk_ln", "attn_uses_sequence_id"):
        inner.only(name, False)
    clip, most = inner.optional_number("clip_qkv"), inner.number("alibi_bias_max", 8.0)
    attention = multi_head(config, hidden, heads, bias=False, alibi=True, qkv_clip=clip)
    attention = replace(attention, scale=inner.number("softmax_scale", attention.scale))
    inner.finish()
    config.only("norm_type", "low_precision_layernorm", "layernorm")
    config.only("no_bias", True)
    config.only("logit_scale", None)
    layer = LayerConfig(
        norm=layer_norm(config, "layer_norm_epsilon", bias=False),
        attention=attention,
        mlp=MlpConfig(width=hidden * config.integer("expansion_ratio", 4), activation=Activation.GELU, gated=False),
    )
    layers = (layer,) * layer_count(config, "n_layers")
    understood = model(config, "mpt", hidden, layers, context=config.integer("max_seq_len"))
    return Understood(config=understood, slope_H=alibi.slopes(heads, most))


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
