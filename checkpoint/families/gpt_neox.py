"""GPT-NeoX, Pythia, RedPajama, Dolly: attention and MLP side by side behind a norm each, heads that rotate in part."""

from ...spec.config import LayerConfig, Residual
from .. import rotary_fields
from ..family import Family, ParsedConfig, alias, head_size, layer_norm
from ..fields import Fields
from ..gpt_like import layer_count, megatron_layer, model, multi_head, plain_mlp
from ..table import Table, frequencies, masks, norm, output, tensor

TABLE = Table(
    prefix="gpt_neox.",
    layers="layers.{layer}.",
    embedding=(tensor("embed_in.weight", "token_VW"),),
    layer=megatron_layer("attention"),
    head=(*norm("final_layer_norm", "norm"), *output("embed_out")),
    older_ends=(("lm_head.weight", "embed_out.weight"),),
    ignorable=(*masks("layers.{layer}.attention"), frequencies("layers.{layer}.attention")),
)


def _read(config: Fields) -> ParsedConfig:
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    places = config.integer("max_position_embeddings")
    turning = rotary_fields.Head(
        size=head_size(config, hidden, heads),
        context=places,
        base=config.number(alias(config, "rotary_emb_base", "rope_theta"), 10000.0),
        part=config.number(alias(config, "rotary_pct", "partial_rotary_factor"), 0.25),
    )
    rotation, bias = rotary_fields.rotation(config, turning), config.flag("attention_bias", True)
    layer = LayerConfig(
        norm=layer_norm(config, "layer_norm_eps"),
        attention=multi_head(config, hidden, heads, bias=bias, rotary=rotation.config),
        mlp=plain_mlp(config, config.integer("intermediate_size"), "hidden_act", "gelu"),
        residual=Residual.PARALLEL if config.flag("use_parallel_residual", True) else Residual.SEQUENTIAL,
    )
    layers = (layer,) * layer_count(config, "num_hidden_layers")
    parsed = model(config, "gpt_neox", hidden, layers, tied=False, context=places)
    return ParsedConfig(config=parsed, rotations=(rotation,) * len(layers))


GPT_NEOX = Family(
    model_type="gpt_neox",
    architectures=("GPTNeoXForCausalLM", "GPTNeoXModel"),
    read=_read,
    table=TABLE,
    ignored={"custom_pipelines": "which code of a model's makers wraps it"},
)
