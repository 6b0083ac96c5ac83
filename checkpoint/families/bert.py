"""BERT, and MiniLM: encoders with learned positions and token types, whose sums are normalized."""

from ..bert_like import IGNORED, read, table, unused
from ..family import Family
from ..table import Ignorable

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
    ignored=IGNORED
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
