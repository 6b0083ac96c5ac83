"""Megatron-LM's GPT, as DeepSpeed loads it: GPT-2 under other names, with Megatron's own arguments as config.json.

With `num_experts`, every `expert_interval`-th layer holds DeepSpeed's `MoE` instead of an MLP: a softmax over all
experts, top-1 as it is and more renormalized, or, with `mlp_type` residual, top-1 beside an MLP and mixed with it
(residual MoE). A list has one number for each layer with experts (a pyramid). DeepSpeed keeps experts in files of
their own and drops tokens over an expert's capacity; here they are one file under the same names, and none is dropped.

The merged projection changed its order twice, and `checkpoint_version` says which it has. Tensor-parallel shards are
joined before, and the nested names of a checkpoint with dots: `language_model.encoder.final_layernorm.weight`.
"""

from ...spec.config import Activation, Head, LayerConfig, MlpConfig
from ...spec.moe import MoeConfig, router
from ..family import Family, ParsedConfig, alias, layer_norm
from ..fields import Fields
from ..gpt_like import layer_count, megatron_layer, model, multi_head
from ..permutation import separated_qkv, separated_thirds
from ..table import Reorder, Table, experts, linear, norm, output, tensor

ORDERS: dict[int, Reorder | None] = {0: None, 1: separated_thirds, 2: separated_qkv, 3: separated_qkv}
"""By `checkpoint_version`: all queries, keys and values; element by element; head by head."""


EXPERTS = (
    *linear("mlp.deepspeed_moe.gate.wg", "mlp.router"),
    *experts("mlp.deepspeed_moe.experts.deepspeed_experts.{expert}.dense_h_to_4h", "mlp.experts.up"),
    *experts("mlp.deepspeed_moe.experts.deepspeed_experts.{expert}.dense_4h_to_h", "mlp.experts.down"),
    *linear("mlp.mlp.dense_h_to_4h", "mlp.residual.up"),
    *linear("mlp.mlp.dense_4h_to_h", "mlp.residual.down"),
    *linear("mlp.coefficient", "mlp.coefficient"),
)
"""DeepSpeed's names of what its `MoE` holds."""


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
        layer=(*megatron_layer("self_attention", reorder=reorder), *EXPERTS),
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
    own_norm = layer_norm(config, alias(config, "layernorm_epsilon", "norm_epsilon"))
    mlp = MlpConfig(width=width, activation=activation, gated=False, bias=True)
    feeds = _feeds(config, mlp, layer_count(config, "num_layers"))
    parsed = model(
        config,
        "megatron_gpt",
        hidden,
        tuple(LayerConfig(norm=own_norm, attention=attention, mlp=feed) for feed in feeds),
        vocabulary=config.integer("padded_vocab_size"),
        context=config.integer("max_position_embeddings"),
        learned_positions=True,
        head=Head.TIED,
    )
    return ParsedConfig(config=parsed, table=_table(ORDERS[version]))


def _feeds(config: Fields, mlp: MlpConfig, layers: int) -> list[MlpConfig | MoeConfig]:
    """Read DeepSpeed's arguments: each layer's MLP, or its experts."""
    residual = config.choice("mlp_type", {"standard": False, "residual": True}, "standard")
    interval, top_k = config.integer("expert_interval", 2), config.integer("topk", 1)
    numbers = _experts_of_layers(config, layers // interval)
    if not numbers:
        return [mlp] * layers
    if config.flag("moe_token_dropping", True):
        config.notes.append("no token is dropped: DeepSpeed drops what is over an expert's capacity")

    def experts_of(count: int) -> MlpConfig | MoeConfig:
        if count <= 1:
            return mlp
        recipe = router("switch" if top_k == 1 else "gshard", experts=count, top_k=top_k)
        return MoeConfig(router=recipe, expert=mlp, residual=mlp if residual else None)

    own = map(experts_of, numbers)
    return [next(own) if (index + 1) % interval == 0 else mlp for index in range(layers)]


def _experts_of_layers(config: Fields, sparse: int) -> list[int]:
    """Return the numbers of experts of the `sparse` layers that have some; none in a dense model."""
    config.ignore(("num_experts",))
    if config.values.get("num_experts") is False:
        return []
    numbers = config.integers("num_experts")
    if all(number <= 1 for number in numbers):
        return []
    if len(numbers) not in (1, sparse):
        raise config.wrong("num_experts", f"one number, or one for each of the {sparse} layers with experts")
    return numbers * sparse if len(numbers) == 1 else numbers


_ABSENT = (
    "use_rotary_position_embeddings apply_layernorm_1p apply_residual_connection_post_layernorm swiglu squared_relu "
    "untie_embeddings_and_output_weights group_query_attention onnx_safe"
)

REQUIRED = {
    "position_embedding_type": "learned_absolute",
    "normalization": "LayerNorm",
    "add_bias_linear": True,
    "add_position_embedding": True,
    **dict.fromkeys(_ABSENT.split(), False),
}
"""Arguments that change results, each with the one value that is computed; null leaves them at it."""

_EXPERT_TRAINING = (
    "moe_expert_parallel_size moe_train_capacity_factor moe_eval_capacity_factor moe_min_capacity moe_loss_coeff "
    "create_moe_param_group use_tutel ds_inference enable_expert_tensor_parallelism moe_top2_2nd_expert_sampling"
)

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
        **dict.fromkeys(_EXPERT_TRAINING.split(), "training, how experts are shared out, and the capacity"),
        **dict.fromkeys(_PRECISION.split(), "the same numbers, computed more or less precisely"),
    },
)
