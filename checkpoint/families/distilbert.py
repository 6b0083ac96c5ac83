"""DistilBERT: BERT without token types, under names of its own."""

from ...spec.config import NormConfig, NormKind
from ..bert_like import IGNORED, encoder, layer, unused
from ..family import Family, ParsedConfig
from ..fields import Fields
from ..gpt_like import layer_count
from ..table import POSITION_IDS, Table, linear, norm, tensor

TABLE = Table(
    prefix="distilbert.",
    layers="transformer.layer.{layer}.",
    embedding=(
        tensor("embeddings.word_embeddings.weight", "token_VW"),
        tensor("embeddings.position_embeddings.weight", "position_PM"),
        *norm("embeddings.LayerNorm", "norm"),
    ),
    layer=(
        *linear("attention.q_lin", "attention.query"),
        *linear("attention.k_lin", "attention.key"),
        *linear("attention.v_lin", "attention.value"),
        *linear("attention.out_lin", "attention.output"),
        *norm("sa_layer_norm", "attention_output_norm"),
        *linear("ffn.lin1", "mlp.up"),
        *linear("ffn.lin2", "mlp.down"),
        *norm("output_layer_norm", "mlp_output_norm"),
    ),
    head=(),
    ignorable=(
        POSITION_IDS,
        *unused("vocab_transform", "vocab_layer_norm", "vocab_projector", why="the masked-language head"),
    ),
)


def _read(config: Fields) -> ParsedConfig:
    norm = NormConfig(kind=NormKind.LAYER, epsilon=1e-12)
    each = layer(config, norm, hidden="dim", heads="n_heads", width="hidden_dim", activation="activation")
    layers, places = (each,) * layer_count(config, "n_layers"), config.integer("max_position_embeddings", 512)
    return ParsedConfig(config=encoder(config, "distilbert", "dim", layers, context=places))


DISTILBERT = Family(
    model_type="distilbert",
    architectures=("DistilBertModel", "DistilBertForMaskedLM"),
    read=_read,
    table=TABLE,
    ignored=IGNORED
    | {
        "sinusoidal_pos_embds": "what the table of positions held before training; it is in the file all the same",
        "tie_weights_": "of the masked-language head alone",
        "qa_dropout": "training",
        "seq_classif_dropout": "training",
    },
)
