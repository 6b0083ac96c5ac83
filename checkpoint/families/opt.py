"""OPT and Galactica: learned positions from the third row on; OPT-350m norms sums and has a narrower token table."""

from ...spec.config import LayerConfig, NormConfig, NormKind, NormPlacement
from ..family import Family, ParsedConfig
from ..fields import Fields
from ..gpt_like import layer_count, model, multi_head, plain_mlp
from ..llama_like import SPLIT_QKV
from ..table import Table, linear, norm, output, tensor


def _table(where: str) -> Table:
    """`where` the norms stand: at the inputs of attention and MLP, or at their outputs."""
    return Table(
        prefix="model.",
        layers="decoder.layers.{layer}.",
        embedding=(
            tensor("decoder.embed_tokens.weight", "token_VW"),
            tensor("decoder.embed_positions.weight", "position_PM"),
            *linear("decoder.project_in", "projection"),
        ),
        layer=(
            *norm("self_attn_layer_norm", f"attention{where}_norm"),
            *SPLIT_QKV,
            *linear("self_attn.out_proj", "attention.output"),
            *norm("final_layer_norm", f"mlp{where}_norm"),
            *linear("fc1", "mlp.up"),
            *linear("fc2", "mlp.down"),
        ),
        head=(
            *norm("decoder.final_layer_norm", "norm"),
            *linear("decoder.project_out", "reduction"),
            *output("lm_head"),
        ),
    )


TABLE, NORMED_SUMS_TABLE = _table(""), _table("_output")


def _read(config: Fields) -> ParsedConfig:
    config.only("learned_embeddings", True)
    config.only("scale_embeddings", False)
    hidden, bias = config.integer("hidden_size"), config.flag("enable_bias", True)
    learned, before = config.flag("layer_norm_elementwise_affine", True), config.flag("do_layer_norm_before", True)
    ends_normed = not config.flag("_remove_final_layer_norm", False) and before
    norm = NormConfig(kind=NormKind.LAYER, epsilon=1e-5, bias=learned)
    layer = LayerConfig(
        norm=norm,
        attention=multi_head(config, hidden, config.integer("num_attention_heads"), bias=bias),
        mlp=plain_mlp(config, config.integer("ffn_dim"), "activation_function", "relu", bias=bias),
        norm_placement=NormPlacement.PRE_NORM if before else NormPlacement.POST_NORM,
    )
    width = config.integer("word_embed_proj_dim", hidden)
    parsed = model(
        config,
        "opt",
        hidden,
        (layer,) * layer_count(config, "num_hidden_layers"),
        context=config.integer("max_position_embeddings"),
        final_norm=norm if ends_normed else None,
        learned_positions=True,
        embedding_size=width if width != hidden else None,
    )
    inner = ("attention_norm", "mlp_norm") if before else ("attention_output_norm", "mlp_output_norm")
    plain_norms = () if learned else (*inner, *(("norm",) if ends_normed else ()))
    table = TABLE if before else NORMED_SUMS_TABLE
    return ParsedConfig(config=parsed, first_position=2, plain_norms=plain_norms, table=table)


OPT = Family(
    model_type="opt",
    architectures=("OPTForCausalLM", "OPTModel"),
    read=_read,
    table=TABLE,
    ignored={"activation_dropout": "training"},
)
