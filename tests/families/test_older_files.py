"""Weight files as they were published first: without the prefix of the class with a head, and with buffers in them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from twinfer.checkpoint import from_transformers, open_model
from twinfer.oracle.trial import same_bits
from twinfer.spec.weights import tensors

MASK = torch.ones(1, 1, 8, 8, dtype=torch.bool)
UNSEEN = torch.tensor(-1e9)
TURNS = torch.ones(2)

OLDER: list[tuple[type[PreTrainedModel], PreTrainedConfig, str, dict[str, Tensor]]] = [
    (
        GPTNeoForCausalLM,
        GPTNeoConfig(vocab_size=9, hidden_size=8, num_layers=2, num_heads=2, attention_types=[[["global"], 2]]),
        "transformer.",
        {"h.{}.attn.attention.bias": MASK, "h.{}.attn.attention.masked_bias": UNSEEN},
    ),
    (
        GPTJForCausalLM,
        GPTJConfig(vocab_size=9, n_embd=8, n_layer=2, n_head=2, rotary_dim=2),
        "transformer.",
        {"h.{}.attn.bias": MASK, "h.{}.attn.masked_bias": UNSEEN},
    ),
    (
        GPTNeoXForCausalLM,
        GPTNeoXConfig(vocab_size=9, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=4),
        "gpt_neox.",
        {
            "layers.{}.attention.bias": MASK,
            "layers.{}.attention.masked_bias": UNSEEN,
            "layers.{}.attention.rotary_emb.inv_freq": TURNS,
        },
    ),
    (
        OPTForCausalLM,
        OPTConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, ffn_dim=4),
        "model.",
        {},
    ),
    (BloomForCausalLM, BloomConfig(vocab_size=9, hidden_size=8, n_layer=2, n_head=2), "transformer.", {}),
]


@pytest.mark.parametrize(("kind", "config", "prefix", "buffers"), OLDER)
def test_files_without_prefix_and_with_buffers(
    kind: type[PreTrainedModel], config: PreTrainedConfig, prefix: str, buffers: dict[str, Tensor], tmp_path: Path
) -> None:
    theirs = kind(config)
    held = {name.removeprefix(prefix): each.clone() for name, each in theirs.state_dict().items()}
    held |= {name.format(layer): each.clone() for name, each in buffers.items() for layer in range(2)}
    save_file(held, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    older, live = open_model(str(tmp_path)).source, from_transformers(theirs)
    assert older.config == live.config
    parts = [(older.embedding(), live.embedding()), (older.head(), live.head())]
    parts += [(older.layer(index), live.layer(index)) for index in range(2)]
    for pair in parts:
        one, other = (dict(tensors(part)) for part in pair)
        assert one.keys() == other.keys()
        assert all(same_bits(each, other[name]) for name, each in one.items())
