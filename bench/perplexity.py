"""Whether the compiled path reads a paragraph as the reference does.

For each storage, the mean log-likelihood of a fixed English paragraph on the reference (float64: the truth; float32)
and on the compiled path, on the same stored weights. The difference between compiled and truth is held against the
budget of a mean logit: twice the mean error of the eager float32 reference plus two roundings at the logits' scale,
averaged over the positions.

Shapes: T tokens, V vocabulary, M hidden.
"""

from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..checkpoint import Checkpoint
from ..compiled.path import CompiledPath
from ..oracle.scale import linear_scale
from ..reference.path import ReferencePath
from ..spec.config import Storage
from ..spec.decoder import Decoder
from ..spec.errors import RequestError

PARAGRAPH = (
    "The lighthouse stood on a narrow point of rock at the end of the island. For more than a hundred years its "
    "keepers had climbed the iron stairs every evening to light the lamp, and every morning to put it out again. "
    "In winter the sea broke over the lower windows, and the wind was so loud that they had to shout to each "
    "other across the kitchen table. When the lamp was replaced by an electric light that needed no one to watch "
    "it, the last keeper moved to the village on the mainland. He said that he slept badly there, because the "
    "nights were too quiet."
)


def compare(checkpoint: Checkpoint, storage: Storage) -> dict[str, Any]:
    """Return the figures of one storage."""
    if checkpoint.tokenizer is None:
        raise RequestError(f"{checkpoint.name} has no tokenizer, which perplexity of a text needs")
    token_T = torch.tensor(checkpoint.tokenizer.encode(PARAGRAPH))
    truth = ReferencePath(checkpoint.source, storage=storage, compute=torch.float64)
    sequences = truth.open(1, len(token_T))
    hidden_TM = truth.extend_hidden(sequences, [token_T])[0]
    truth_TV = truth.logits(hidden_TM)
    scale_T = truth.config.logit_scale * linear_scale(hidden_TM.abs(), truth.weights.projection).amax(-1)
    del truth
    eager_TV = _logits(ReferencePath(checkpoint.source, storage=storage), token_T)
    compiled_TV = _logits(CompiledPath(checkpoint.source, storage=storage), token_T)
    eager_error = float((eager_TV - truth_TV).abs().mean())
    bound = 2 * eager_error + 2 * torch.finfo(torch.float32).eps * float(scale_T.mean())
    likelihoods = [_mean_log_likelihood(logits_TV, token_T) for logits_TV in (truth_TV, eager_TV, compiled_TV)]
    difference = abs(likelihoods[2] - likelihoods[0])
    return {
        "storage": storage.value,
        "perplexity_reference_float64": float(torch.tensor(-likelihoods[0]).exp()),
        "perplexity_reference_float32": float(torch.tensor(-likelihoods[1]).exp()),
        "perplexity_compiled": float(torch.tensor(-likelihoods[2]).exp()),
        "mean_log_likelihood_difference": difference,
        "mean_logit_bound": bound,
        "holds": difference <= bound,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print the figures as a table."""
    table = Table(title="perplexity of a fixed paragraph")
    for title in ("storage", "reference f64", "reference f32", "compiled", "difference", "bound", "holds"):
        table.add_column(title, justify="left" if title == "storage" else "right")
    for row in rows:
        perplexities = [f"{value:.5f}" for name, value in row.items() if name.startswith("perplexity")]
        difference, bound = f"{row['mean_log_likelihood_difference']:.2e}", f"{row['mean_logit_bound']:.2e}"
        table.add_row(row["storage"], *perplexities, difference, bound, "yes" if row["holds"] else "NO")
    Console().print(table)


def _logits(path: Decoder, token_T: Tensor) -> Tensor:
    sequences = path.open(1, len(token_T))
    logits_TV = path.extend(sequences, [token_T], every_position=True)[0]
    sequences.close()
    return logits_TV.cpu()


def _mean_log_likelihood(logits_TV: Tensor, token_T: Tensor) -> float:
    """Of each token after the first, given those before it; in float64."""
    return -float(torch.nn.functional.cross_entropy(logits_TV[:-1].double(), token_T[1:]))
