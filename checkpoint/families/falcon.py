"""Falcon, in its three forms: 7B (one key/value head), 40B and 11B (grouped heads), RW (ALiBi, one after the other)."""

from dataclasses import replace

from ...spec.config import LayerConfig, Residual
from .. import alibi, rotary_fields
from ..family import Family, ParsedConfig, alias, head_size, layer_norm
from ..fields import Fields
from ..gpt_like import layer_count, megatron_layer, model, multi_head, plain_mlp
from ..table import Table, norm, output, tensor

TABLE = Table(
    prefix="transformer.",
    layers="h.{layer}.",
    embedding=(tensor("word_embeddings.weight", "token_VE"),),
    layer=megatron_layer("self_attention"),
    head=(*norm("ln_f", "norm"), *output("lm_head")),
)
TWO_NORMS_TABLE = replace(TABLE, layer=megatron_layer("self_attention", ("ln_attn", "ln_mlp")))


def _read(config: Fields) -> ParsedConfig:
    hidden = config.integer(alias(config, "hidden_size", "n_embed"))
    heads = config.integer(alias(config, "num_attention_heads", "n_head"))
    bias, with_alibi = config.flag("bias", False), config.flag("alibi", False)
    places, size = config.integer("max_position_embeddings", 2048), head_size(config, hidden, heads)
    rotation = rotary_fields.rotation(config, rotary_fields.Head(size=size, context=places))
    config.only("apply_residual_connection_post_layernorm", False)
    kv_heads, residual = _form(config, heads)
    width = config.integer("ffn_hidden_size", 4 * hidden)
    config.only("ff_factor", width / hidden)
    positions = {"alibi": True} if with_alibi else {"rotary": rotation.config}
    layer = LayerConfig(
        norm=layer_norm(config, "layer_norm_epsilon"),
        attention=multi_head(config, hidden, heads, bias=bias, kv_heads=kv_heads, **positions),
        mlp=plain_mlp(config, width, "activation", "gelu", bias=bias),
        residual=residual,
    )
    layers = (layer,) * layer_count(config, alias(config, "num_hidden_layers", "n_layer"))
    return ParsedConfig(
        config=model(config, "falcon", hidden, layers, context=places),
        rotations=() if with_alibi else (rotation,) * len(layers),
        slopes=(lambda: alibi.slopes(heads) * size**-0.5) if with_alibi else None,  # added before scores are scaled
        table=TWO_NORMS_TABLE if residual is Residual.PARALLEL else TABLE,
    )


def _form(config: Fields, heads: int) -> tuple[int, Residual]:
    """How many key/value heads, and whether attention and MLP stand side by side; by defaults that have changed."""
    named = config.text("model_type", "falcon")
    multi_query = config.flag("multi_query", named == "falcon")
    parallel = config.flag("parallel_attn", named == "falcon")
    kv_field = alias(config, "num_kv_heads", "n_head_kv")
    if config.flag("new_decoder_architecture", named == "RefinedWeb"):
        config.only("parallel_attn", True)
        norms = config.integer("num_ln_in_parallel_attn", 2, most=2)
        return config.integer(kv_field, heads), Residual.PARALLEL if norms == 2 else Residual.PARALLEL_SHARED_NORM
    if multi_query:
        config.ignore((kv_field,))  # transformers writes the number of heads
    else:
        config.only(kv_field, heads, None)
    if parallel:
        config.only("num_ln_in_parallel_attn", None, 1)
    config.ignore(("num_ln_in_parallel_attn",))
    return 1 if multi_query else heads, Residual.PARALLEL_SHARED_NORM if parallel else Residual.SEQUENTIAL


FALCON = Family(
    model_type="falcon",
    architectures=("FalconForCausalLM", "FalconModel"),
    read=_read,
    table=TABLE,
    remote_code=("configuration_falcon", "modeling_falcon"),
)

REFINED_WEB = replace(
    FALCON,
    model_type="RefinedWeb",
    architectures=("RWForCausalLM", "RWModel"),
    remote_code=("configuration_RW", "modelling_RW"),
)
"""Falcon-40B, as it was first published."""

REFINED_WEB_MODEL = replace(REFINED_WEB, model_type="RefinedWebModel")
"""Falcon-7B and Falcon-RW."""
