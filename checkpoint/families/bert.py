"""BERT, and MiniLM: encoders with learned positions and token types, whose sums are normalised."""

from ...spec.config import AttentionConfig, Head, LayerConfig, MlpConfig, ModelConfig, NormConfig, NormPlacement
from ..family import ACTIVATIONS, Family, Understood, context, head_size, layer_norm
from ..fields import MOST_LAYERS, Fields
from ..table import Ignorable, Table, linear, norm, tensor


def table(prefix: str, *heads: Ignorable) -> Table:
    """BERT's names, with those of the heads that it was trained under."""
    return Table(
        prefix=prefix,
        layers="encoder.layer.{layer}.",
        embedding=(
            tensor("embeddings.word_embeddings.weight", "token_VE"),
            tensor("embeddings.position_embeddings.weight", "position_PM"),
            tensor("embeddings.token_type_embeddings.weight", "type_YM"),
            *norm("embeddings.LayerNorm", "norm"),
        ),
        layer=(
            *linear("attention.self.query", "attention.query"),
            *linear("attention.self.key", "attention.key"),
            *linear("attention.self.value", "attention.value"),
            *linear("attention.output.dense", "attention.output"),
            *norm("attention.output.LayerNorm", "attention_output_norm"),
            *linear("intermediate.dense", "mlp.up"),
            *linear("output.dense", "mlp.down"),
            *norm("output.LayerNorm", "mlp_output_norm"),
        ),
        head=(),
        ignorable=(
            Ignorable(name="embeddings.position_ids", why="0, 1, 2 and so on, kept as a buffer"),
            *unused("pooler.dense", why="a further layer over the first token, for classifiers"),
            *heads,
        ),
        older_ends=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
    )


def unused(*modules: str, why: str) -> tuple[Ignorable, ...]:
    """The weight and bias of modules that follow the hidden vectors."""
    return tuple(Ignorable(name=f"{each}.{kind}", why=why) for each in modules for kind in ("weight", "bias"))


def layer(config: Fields, norm: NormConfig, *, hidden: str, heads: str, width: str, activation: str) -> LayerConfig:
    """An encoder's layer whose sums are normalised, from fields of these names."""
    head_count = config.integer(heads)
    size = head_size(config, config.integer(hidden), head_count)
    return LayerConfig(
        norm=norm,
        attention=AttentionConfig(
            heads=head_count,
            kv_heads=head_count,
            head_size=size,
            scale=size**-0.5,
            causal=False,
            qkv_bias=True,
            output_bias=True,
        ),
        mlp=MlpConfig(
            width=config.integer(width),
            activation=config.choice(activation, ACTIVATIONS, "gelu"),
            gated=False,
            bias=True,
        ),
        norm_placement=NormPlacement.ON_SUM,
    )


def read(config: Fields, *, first_position: int = 0) -> Understood:
    """A config with BERT's names of fields; `first_position` as `Understood` has it."""
    config.only("is_decoder", False)
    config.only("position_embedding_type", "absolute")
    norm = layer_norm(config, "layer_norm_eps", 1e-12)
    names = {"heads": "num_attention_heads", "width": "intermediate_size", "activation": "hidden_act"}
    model = ModelConfig(
        family=config.text("model_type", "bert"),
        hidden=config.integer("hidden_size"),
        vocabulary=config.integer("vocab_size"),
        context=context(config, "max_position_embeddings", 512) - first_position,
        layers=(layer(config, norm, hidden="hidden_size", **names),)
        * config.integer("num_hidden_layers", most=MOST_LAYERS),
        final_norm=None,
        learned_positions=True,
        head=Head.NONE,
        embedding_norm=norm,
        token_types=config.integer("type_vocab_size", 2),
    )
    return Understood(config=model, first_position=first_position)


HARMLESS = {
    "tie_word_embeddings": "of the masked-language head alone",
    "output_past": "of decoders",
}

BERT = Family(
    model_type="bert",
    architectures=("BertModel", "BertForMaskedLM", "BertForPreTraining", "BertForNextSentencePrediction"),
    read=read,
    table=table(
        "bert.",
        *unused(
            "cls.predictions.transform.dense",
            "cls.predictions.transform.LayerNorm",
            "cls.predictions.decoder",
            why="the masked-language head",
        ),
        Ignorable(name="cls.predictions.bias", why="the masked-language head"),
        *unused("cls.seq_relationship", why="the next-sentence head"),
    ),
    harmless=HARMLESS
    | dict.fromkeys(
        (
            "directionality",
            "pooler_fc_size",
            "pooler_num_attention_heads",
            "pooler_num_fc_layers",
            "pooler_size_per_head",
            "pooler_type",
        ),
        "of a pooler that no such file holds",
    ),
)
