"""`twinfer embed`: texts as vectors, and how alike they are."""

import argparse

from rich.markup import escape
from rich.table import Table
from torch import Tensor

from twinfer.spec.config import Pooling
from twinfer.spec.errors import RequestError

from ..embedding import chosen, cosines, text_ids
from ..loading import load, open_checkpoint
from .console import print_json, print_table, waiting
from .options import add_arithmetic, add_json, add_model, read_lines, unicode_text

COLUMNS = 8
"""As many texts have a column in the table; --json has all of them."""

NAME, HELP = "embed", "turn texts into vectors, and show how alike they are"
DESCRIPTION = "Turn texts into one vector each, and show how alike they are."
EPILOG = f"""\
examples:
  twinfer embed minilm --path reference --text "A cat sleeps." --text "A kitten naps." --text "Stocks fell."
  twinfer embed minilm --texts sentences.txt --json

A text's vector is made of its tokens' hidden vectors, those of special tokens among them: their mean, or the first
one (cls); scaled to length 1 or not. By default as the model's folder says (modules.json); where it says nothing, the
mean, not scaled. A text of more tokens than the model is made for is an error: nothing is cut off.

The table shows the cosine between every text and the first {COLUMNS}: 1 for the same direction, 0 for unrelated ones.

with --json, one object: {{"model", "path", "storage", "compute", "device", "pooling", "normalize", "width",
  "texts": [{{"text", "ids", "vector"}}], "cosines": [[...], ...]}}
  width    elements of a vector
  ids      the text's token ids, special ones included
  cosines  a row for each text, with the cosine to each
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--text", type=unicode_text, action="append", default=[], metavar="TEXT", help="a text; repeatable"
    )
    parser.add_argument(
        "--texts", metavar="FILE", help="UTF-8 text, one text a line, blank lines skipped; - is standard input"
    )
    parser.add_argument(
        "--pooling",
        choices=[pooling.value for pooling in Pooling],
        help="mean of all tokens, or the first one's (default: as the model's folder says, else mean)",
    )
    parser.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="scale vectors to length 1, or not (default: as the model's folder says, else not)",
    )
    add_arithmetic(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    texts = args.text + ([] if args.texts is None else read_lines(args.texts, "text"))
    if not texts:
        raise RequestError("there is no text; give --text or --texts")
    with waiting() as report:
        checkpoint = open_checkpoint(args.model, report)
        pooling, normalize = chosen(checkpoint.embedding, args.pooling, args.normalize)
        ids = text_ids(checkpoint, texts)  # before minutes of compiling
        model = load(checkpoint, args.path, args.storage, args.compute, args.device, report=report)
        vector_NM = model.embed(ids, pooling=pooling, normalize=normalize).cpu()
    if args.json:
        outputs = [
            {"text": text, "ids": each, "vector": vector_M.tolist()}
            for text, each, vector_M in zip(texts, ids, vector_NM, strict=True)
        ]
        about = {
            "model": args.model,
            "path": model.path.value,
            "storage": model.storage.value,
            "compute": model.compute.value,
            "device": str(model.decoder.device),
            "pooling": pooling.value,
            "normalize": normalize,
            "width": vector_NM.shape[1],
        }
        print_json({**about, "texts": outputs, "cosines": cosines(vector_NM).tolist()})
        return 0
    scaled = "scaled to length 1" if normalize else "not scaled"
    print(f"{args.model}: vectors of {vector_NM.shape[1]} elements, pooling {pooling}, {scaled}")
    print_table(_table(texts, [len(each) for each in ids], cosines(vector_NM)))
    if len(texts) > COLUMNS:
        print(f"cosines to the first {COLUMNS} texts; --json has all of them")
    return 0


def _table(texts: list[str], tokens: list[int], cosine_NN: Tensor) -> Table:
    table = Table("", "text", "tokens", *(str(index) for index in range(min(len(texts), COLUMNS))))
    for column in (table.columns[0], *table.columns[2:]):
        column.justify = "right"
        column.no_wrap = True
    for index, (text, count, cosine_N) in enumerate(zip(texts, tokens, cosine_NN.tolist(), strict=True)):
        table.add_row(str(index), escape(_shown(text)), str(count), *(f"{value:z.3f}" for value in cosine_N[:COLUMNS]))
    return table


def _shown(text: str, most: int = 60) -> str:
    """A text as one line of at most so many characters, with nothing in it that a terminal would obey.

    >>> _shown("two\\nlines", 6)
    'two...'
    """
    line = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in " ".join(text.split()))
    return line if len(line) <= most else line[: most - 3] + "..."
