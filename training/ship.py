"""Make of trained runs what is shown of them: the folder that twinfer opens, and a chart of the losses.

python training/ship.py export runs/moe-0 checkpoint/included/tiny-moe
python training/ship.py report runs/* --chart docs/tiny-moe.png
"""

import argparse
import json
from pathlib import Path

import tokenizers
import torch
from tiny_moe import BATCH, END, Weights, mixture_config, rotary_frequency, under

from twinfer.checkpoint import Checkpoint
from twinfer.checkpoint.tokenizer import Tokenizer
from twinfer.converting import convert
from twinfer.spec.config import ModelConfig, Storage
from twinfer.spec.shard import Shard
from twinfer.spec.weights import EmbeddingWeights, HeadWeights, LayerWeights, assemble


class Trained:
    """A `WeightSource` over trained weights."""

    def __init__(self, weights: Weights, config: ModelConfig):
        self.config = config
        self._weights = weights

    def embedding(self, shard: Shard | None = None) -> EmbeddingWeights:
        return assemble(EmbeddingWeights, under(self._weights, "embedding."))

    def layer(self, index: int, shard: Shard | None = None) -> LayerWeights:
        rotary = {"attention.rotary_frequency_J": rotary_frequency()}
        return assemble(LayerWeights, under(self._weights, f"{index}.") | rotary)

    def head(self, shard: Shard | None = None) -> HeadWeights:
        return assemble(HeadWeights, under(self._weights, "head."))


def byte_tokenizer() -> Tokenizer:
    """Return the tokenizer whose ids are the bytes of the text in UTF-8.

    The library writes each byte as one visible sign: those that are visible in Latin-1 as themselves, the others, in
    their order, as the signs from U+0100 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    signs = {chr(byte if byte in visible else 0x100 + hidden.index(byte)): byte for byte in range(256)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=signs, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(inner)


def export(run: Path, folder: Path) -> None:
    """Write what a run has trained in the twinfer form, in bfloat16."""
    config = mixture_config()
    checkpoint = Checkpoint(
        name="tiny-moe",
        source=Trained(torch.load(run / "checkpoint.pt")["weights"], config),
        config=config,
        tokenizer=byte_tokenizer(),
        end_tokens=(END,),
        chat_template=None,
        special_tokens={},
    )
    convert(checkpoint, folder, Storage.BFLOAT16, print)


def report(runs: list[Path], chart: Path) -> None:
    """Print the runs' bits per byte on the held-out books, and draw their losses, each a mean of 50 steps."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for run in runs:
        result = json.loads((run / "result.json").read_text())
        kind, losses = ("dense" if result["dense"] else "mixture"), result.pop("losses")
        means = [sum(losses[at : at + 50]) / 50 for at in range(0, len(losses) - 49, 50)]
        first = result["seed"] == 0
        axes.plot(
            [50 * (index + 1) * BATCH / 1e6 for index in range(len(means))],
            means,
            color="tab:gray" if result["dense"] else "tab:blue",
            linewidth=1.0,
            label=f"{kind}, {result['parameters']:,} parameters" if first else None,
        )
        print(f"{kind}, seed {result['seed']}: {result['bits_per_byte']:.4f} ({result['bits_per_byte_bfloat16']:.4f})")
    axes.set(xlabel="million bytes seen", ylabel="training loss, bits a byte", ylim=(1.2, 4.0))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(chart, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Export a trained mixture, or report what runs reached.")
    commands = parser.add_subparsers(dest="command", required=True)
    exporting = commands.add_parser("export", help="write a trained mixture as a folder that twinfer opens")
    exporting.add_argument("run", type=Path)
    exporting.add_argument("folder", type=Path)
    reporting = commands.add_parser("report", help="print and draw what runs reached")
    reporting.add_argument("runs", type=Path, nargs="+")
    reporting.add_argument("--chart", type=Path, required=True)
    args = parser.parse_args()
    if args.command == "export":
        export(args.run, args.folder)
    else:
        report(args.runs, args.chart)


if __name__ == "__main__":
    main()
