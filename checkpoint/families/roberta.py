"""RoBERTa, XLM-RoBERTa and CamemBERT: BERT with positions counted from behind the padding token's id.

The row of the position table that belongs to the first token is pad_token_id + 1; the rows before it are never used.
"""

from ..bert_like import IGNORED, read, table, unused
from ..family import Family, ParsedConfig
from ..fields import Fields
from ..table import Ignorable

TABLE = table(
    "roberta.",
    *unused("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", why="the masked-language head"),
    Ignorable(name="lm_head.bias", why="the masked-language head"),
)


def _read(config: Fields) -> ParsedConfig:
    padding = config.integer("pad_token_id", 1, least=0)
    positions = config.integer("max_position_embeddings", 512)
    if positions <= padding + 1:
        raise config.wrong("max_position_embeddings", f"above {padding + 1}, the first position (pad_token_id + 1)")
    return read(config, first_position=padding + 1)


def _family(model_type: str, name: str) -> Family:
    classes = (f"{name}Model", f"{name}ForMaskedLM")
    return Family(model_type=model_type, architectures=classes, read=_read, table=TABLE, ignored=IGNORED)


ROBERTA = _family("roberta", "Roberta")
XLM_ROBERTA = _family("xlm-roberta", "XLMRoberta")
CAMEMBERT = _family("camembert", "Camembert")
