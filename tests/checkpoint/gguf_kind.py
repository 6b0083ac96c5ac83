"""A GGUF architecture whose models are tried: how they are drawn and written, and which wrong readings must be seen."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gguf
import transformers as hf
from hypothesis import strategies as st

from .gguf_converter import Config, Rows, kept

NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def llama_sizes(sizes: dict[str, int]) -> dict[str, Any]:
    heads = sizes["kv_heads"] * sizes["group"]
    return {
        "vocab_size": sizes["vocabulary"],
        "hidden_size": heads * sizes["size"],
        "intermediate_size": sizes["width"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": sizes["kv_heads"],
        "max_position_embeddings": 40,
        **NO_TOKENS,
    }


SIZES = st.fixed_dictionaries(
    {
        "vocabulary": st.integers(3, 30),
        "layers": st.integers(1, 3),
        "kv_heads": st.integers(1, 3),
        "group": st.integers(1, 2),
        "size": st.sampled_from([4, 8]),
        "width": st.integers(1, 20),
    }
)
CHOSEN = {"vocabulary": 20, "layers": 2, "kv_heads": 3, "group": 2, "size": 8, "width": 12}

yes_or_no = st.booleans()
windows = st.integers(1, 14)
ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "default", "rope_theta": 100.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 10},
    {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 2.5,
        "original_max_position_embeddings": 16,
        "beta_fast": 8.0,
    },
]
ropes = st.sampled_from(ROPES)
HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
parts = st.sampled_from([0.25, 0.5, 1.0]).map(lambda part: HALF | {"partial_rotary_factor": part})
USUAL = 2.0**-17
epsilons = st.sampled_from([USUAL, 0.25])

TIED = {"tie_word_embeddings": yes_or_no}
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
RMS, LAYER, GPT, STARCODER2 = ({name: epsilons} for name in EPSILONS)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How to draw and write a model of an architecture."""

    architecture: str
    model: type[hf.PreTrainedModel]
    config: type[Config]
    options: dict[str, st.SearchStrategy[Any]]
    keys: Callable[[gguf.GGUFWriter, Config], None]
    rows: Callable[[str, Rows, Config], Rows] = kept
    sizes: Callable[[dict[str, int]], dict[str, Any]] = llama_sizes
    chosen: dict[str, Any] = field(default_factory=dict)
    wrong: tuple[dict[str, Any], ...] = ()
    """Changes of the architecture's record that must be seen."""
    read_by_transformers: bool = False

    def usual(self) -> Config:
        """The model on which wrong mappings are tried."""
        exact = {name: USUAL for name in EPSILONS if name in self.options}
        return self.made(CHOSEN, exact | self.chosen)

    def drawn(self) -> st.SearchStrategy[Config]:
        return st.builds(lambda sizes, options: self.made(sizes, options), SIZES, st.fixed_dictionaries(self.options))

    def made(self, sizes: dict[str, int], options: dict[str, Any]) -> Config:
        options = dict(options)
        sizes = sizes | {"layers": options.pop("layers", sizes["layers"]), "size": options.pop("size", sizes["size"])}
        return self.config(**self.sizes(sizes) | options)
