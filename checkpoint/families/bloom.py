"""BLOOM: ALiBi, a norm of the embeddings, and a query-key-value projection merged head by head."""

from ...spec.config import Activation, LayerConfig, MlpConfig, NormPlacement
from .. import alibi
from ..family import Family, ParsedConfig, alias, layer_norm
from ..fields import Fields
from ..gpt_like import layer_count, megatron_layer, model, multi_head
from ..table import Table, norm, output, tensor

TABLE = Table(
    prefix="transformer.",
    layers="h.{layer}.",
    embedding=(tensor("word_embeddings.weight", "token_VE"), *norm("word_embeddings_layernorm", "norm")),
    layer=megatron_layer("self_attention"),
    head=(*norm("ln_f", "norm"), *output("lm_head")),
)

TRAINED_CONTEXT = 2048
"""Tokens that BLOOM was trained on, which `seq_length` says in some files; ALiBi itself has no end."""


def _read(config: Fields) -> ParsedConfig:
    hidden = config.integer(alias(config, "hidden_size", "n_embed"))
    heads = config.integer(alias(config, "n_head", "num_attention_heads"))
    norm = layer_norm(config, "layer_norm_epsilon")
    config.only("n_inner", None, 4 * hidden)
    config.only("skip_bias_add_qkv", False)
    on_stream = config.flag("apply_residual_connection_post_layernorm", False)
    layer = LayerConfig(
        norm=norm,
        attention=multi_head(config, hidden, heads, alibi=True),
        mlp=MlpConfig(width=4 * hidden, activation=Activation.GELU_TANH, gated=False, bias=True),
        norm_placement=NormPlacement.STREAM_NORM if on_stream else NormPlacement.PRE_NORM,
    )
    layers = (layer,) * layer_count(config, alias(config, "n_layer", "num_hidden_layers"))
    places = config.integer("seq_length", TRAINED_CONTEXT)
    parsed = model(config, "bloom", hidden, layers, context=places, embedding_norm=norm)
    return ParsedConfig(config=parsed, slopes=lambda: alibi.slopes(heads))


BLOOM = Family(
    model_type="bloom",
    architectures=("BloomForCausalLM", "BloomModel"),
    read=_read,
    table=TABLE,
    ignored={
        "slow_but_exact": "the same sums in the order in which they were trained",
        "masked_softmax_fusion": "the same result in fewer kernels",
        "bias_dropout_fusion": "likewise",
        "skip_bias_add": "likewise: the bias is added later",
        "offset_alibi": "adds the same to every score of a row, which a softmax does not see",
        "unk_token_id": "the tokenizer's",
    },
)
