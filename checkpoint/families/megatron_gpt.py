"""Megatron-LM's GPT, as DeepSpeed loads it: GPT-2 under other names, with Megatron's own arguments as config.json.

The merged projection changed its order twice, and `checkpoint_version` says which it has. Tensor-parallel shards are
joined before, and the nested names of a checkpoint with dots: `language_model.encoder.final_layernorm.weight`.
"""

from ...spec.config import Activation, Head, LayerConfig, MlpConfig
from ..family import Family, ParsedConfig, alias, layer_norm
from ..fields import Fields
from ..gpt_like import layer_count, megatron_layer, model, multi_head
from ..permutation import separated_qkv, separated_thirds
from ..table import Reorder, Table, norm, output, tensor

ORDERS: dict[int, Reorder | None] = {0: None, 1: separated_thirds, 2: separated_qkv, 3: separated_qkv}
"""By `checkpoint_version`: all queries, keys and values; element by element; head by head."""


def _table(reorder: Reorder | None) -> Table:
    return Table(
        prefix="language_model.",
        older_starts=(("transformer.", "encoder."),),
        older_ends=tuple(
            (f".attention.{each}", f".self_attention.{each}")
            for each in ("query_key_value.weight", "query_key_value.bias", "dense.weight", "dense.bias")
        ),
        layers="encoder.layers.{layer}.",
        embedding=(
            tensor("embedding.word_embeddings.weight", "token_VW"),
            tensor("embedding.position_embeddings.weight", "position_PM"),
        ),
        layer=megatron_layer("self_attention", reorder=reorder),
        head=(*norm("encoder.final_layernorm", "norm"), *output("word_embeddings_for_head")),
    )


def _read(config: Fields) -> ParsedConfig:
    config.ignore(("checkpoint_version",))
    version = config.values.get("checkpoint_version")
    if version not in list(ORDERS):
        raise config.wrong("checkpoint_version", "0, 1, 2 or 3, as the checkpoint says")
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    attention = multi_head(config, hidden, heads)
    for name, computed in {**REQUIRED, "kv_channels": attention.head_size}.items():
        config.only(name, computed, None)
    fused, openai = config.flag("bias_gelu_fusion", True), config.flag("openai_gelu", False)
    activation = Activation.GELU_TANH if fused or openai else Activation.GELU
    width = config.integer("ffn_hidden_size", 4 * hidden)
    layer = LayerConfig(
        norm=layer_norm(config, alias(config, "layernorm_epsilon", "norm_epsilon")),
        attention=attention,
        mlp=MlpConfig(width=width, activation=activation, gated=False, bias=True),
    )
    parsed = model(
        config,
        "megatron_gpt",
        hidden,
        (layer,) * layer_count(config, "num_layers"),
        vocabulary=config.integer("padded_vocab_size"),
        context=config.integer("max_position_embeddings"),
        learned_positions=True,
        head=Head.TIED,
    )
    return ParsedConfig(config=parsed, table=_table(ORDERS[version]))


_ABSENT = (
    "use_rotary_position_embeddings apply_layernorm_1p apply_residual_connection_post_layernorm swiglu squared_relu "
    "untie_embeddings_and_output_weights group_query_attention onnx_safe num_experts"
)

REQUIRED = {
    "position_embedding_type": "learned_absolute",
    "normalization": "LayerNorm",
    "add_bias_linear": True,
    "add_position_embedding": True,
    **dict.fromkeys(_ABSENT.split(), False),
}
"""Arguments that change results, each with the one value that is computed; null leaves them at it."""

_PRECISION = (
    "fp16 bf16 params_dtype fp32_residual_connection apply_query_key_layer_scaling "
    "masked_softmax_fusion bias_dropout_fusion"
)

MEGATRON_GPT = Family(
    model_type="megatron_gpt",
    architectures=("GPTModel",),
    read=_read,
    table=_table(None),
    ignored={
        "vocab_size": "the tokens before the table was padded",
        "make_vocab_size_divisible_by": "what the table was padded to",
        "num_query_groups": "counts with group_query_attention alone, which is refused",
        "seq_length": "training",
        **dict.fromkeys(_PRECISION.split(), "the same numbers, computed more or less precisely"),
    },
)
