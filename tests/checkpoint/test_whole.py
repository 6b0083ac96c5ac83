"""The trained model, from its name to its words; and the promises that hold for every declaration in the room."""

import doctest

import pytest
import torch

from twinfer.checkpoint import Checkpoint, alibi, open_model, permutation, rotary, table
from twinfer.checkpoint.families import FAMILIES
from twinfer.checkpoint.gguf import table as gguf_table
from twinfer.checkpoint.gguf.architectures import ARCHITECTURES
from twinfer.checkpoint.table import Table
from twinfer.reference.path import ReferencePath
from twinfer.spec.config import Head
from twinfer.spec.weights import validate_embedding, validate_head, validate_layer


@pytest.fixture(scope="module")
def model() -> Checkpoint:
    return open_model("smollm2")


def test_the_trained_model_says_paris(model: Checkpoint) -> None:
    """Greedy, float32, after "The capital of France is": the ids that every other engine gives."""
    path = ReferencePath(model.source)
    sequences, new, said = path.open(1, 16), torch.tensor([504, 3575, 282, 4649, 314]), []
    for _ in range(4):
        said.append(int(path.extend(sequences, [new])[0].argmax()))
        new = torch.tensor(said[-1:])
    assert said == [7042, 30, 198, 198]
    assert model.tokenizer is not None
    assert model.tokenizer.decode(said) == " Paris.\n\n"


def test_the_trained_model_fits_its_config(model: Checkpoint) -> None:
    source, config = model.source, model.config
    validate_embedding(source.embedding(), config)
    validate_layer(source.layer(29), config, 29)
    validate_head(source.head(), config)
    assert (len(config.layers), config.hidden, config.vocabulary, config.context) == (30, 576, 49152, 8192)
    assert config.head is Head.TIED
    assert source.head().projection is None


def test_parts_are_made_anew_and_equal(model: Checkpoint) -> None:
    """Nothing is held between calls, so a reader that drops a layer has given its memory back."""
    one, other = model.source.layer(3).mlp.up.weight_NI, model.source.layer(3).mlp.up.weight_NI
    assert torch.equal(one, other)
    assert one.data_ptr() != other.data_ptr()


TABLES = {family.model_type: family.table for family in FAMILIES} | {
    f"gguf {name}{''.join(held)}": gguf_table.table(architecture, held)
    for name, architecture in ARCHITECTURES.items()
    for held in ((), ("blk.0.attn_qkv.weight", "blk.0.attn_norm_2.weight"))
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
def test_tables_fill_every_weight_once(table: Table) -> None:
    """Routers, what stands beside experts, and sinks may have two names, in a file and in a module; experts have three
    forms: stacked, gate and up in one, and each expert apart."""
    for entries in (table.embedding, table.layer, table.head):
        names = [entry.name for entry in entries]
        fills = [target for entry in entries for target in entry.fills]
        assert len(names) == len(set(names))
        for fill in set(fills):
            renamed = fill.startswith(("mlp.router.", "mlp.choice_bias_E", "mlp.shared.", "attention.sink_H"))
            most = 3 if fill.startswith("mlp.experts.") else 2 if renamed else 1
            assert fills.count(fill) <= most, fill
    assert "{layer}" in table.layers
    assert all(entry.why for entry in table.ignorable)
    assert not any("{layer}" in entry.name for entry in (*table.embedding, *table.layer, *table.head))


@pytest.mark.parametrize("module", [alibi, permutation, rotary, table])
def test_worked_examples(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted > 0
    assert result.failed == 0
