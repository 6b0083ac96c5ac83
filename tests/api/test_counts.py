"""Parameter counts against the weights themselves, and against the figures of the paper."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import RandomSource, draw_model_config
from twinfer.spec.config import Storage
from twinfer.spec.counts import Component, cache_bytes_per_token, count, total
from twinfer.spec.errors import RequestError
from twinfer.spec.moe import MoeConfig, RouterConfig
from twinfer.spec.paper_models import PAPER_MODELS, paper_model
from twinfer.spec.weights import EmbeddingWeights, HeadWeights, LayerWeights, tensors

HALVES = {"attention": Component.ATTENTION, "mlp": Component.MLP}
ENDS = {EmbeddingWeights: Component.EMBEDDING, HeadWeights: Component.HEAD}
NORMS = {"norm", "attention_norm", "mlp_norm", "attention_output_norm", "mlp_output_norm", "query_norm", "key_norm"}
MADE = {"rotary_frequency_J", "alibi_slope_H"}


def trained(source):
    """Every trained tensor of a model, with the component it belongs to."""
    for part in (source.embedding(), *map(source.layer, range(len(source.config.layers))), source.head()):
        for name, tensor in tensors(part):
            pieces = name.split(".")
            if NORMS & {*pieces}:
                yield Component.NORMS, name, tensor
            elif pieces[-1] not in MADE:
                yield HALVES[pieces[0]] if isinstance(part, LayerWeights) else ENDS[type(part)], name, tensor


@given(seed=st.integers(0, 2**32))
def test_counts_are_the_elements_of_the_weights(seed):
    """For any config, each component counts exactly the elements, and in each storage the bytes, of its tensors."""
    config = draw_model_config(RandomPicker(seed))
    counts = count(config)
    for component in Component:
        mine = [(name, tensor) for part, name, tensor in trained(RandomSource(config)) if part is component]
        matrices = [tensor for name, tensor in mine if name.endswith(("weight_NI", "token_VW"))]
        elements, in_matrices = sum(t.numel() for _, t in mine), sum(t.numel() for t in matrices)
        rows = sum(len(t) for t in matrices)
        groups = sum(len(t) * len(t[0].split(64)) for t in matrices)
        assert counts[component].parameters == elements
        assert counts[component].bytes(Storage.FLOAT32) == 4 * elements
        assert counts[component].bytes(Storage.BFLOAT16) == 4 * elements - 2 * in_matrices
        assert counts[component].bytes(Storage.INT8) == 4 * elements - 3 * in_matrices + 4 * rows
        assert counts[component].bytes(Storage.INT4) == 4 * elements - 7 * in_matrices // 2 + 8 * groups
    assert total(config).parameters == sum(tensor.numel() for _, _, tensor in trained(RandomSource(config)))


@given(seed=st.integers(0, 2**32), experts=st.integers(2, 9))
def test_experts_multiply_the_mlp_and_add_a_router(seed, experts):
    """E experts hold E times what the dense MLP held, beside a router of hidden * E a layer; the rest is unchanged."""
    config = draw_model_config(RandomPicker(seed))
    how = RouterConfig(experts=experts, top_k=1)
    layers = tuple(replace(layer, mlp=MoeConfig(router=how, expert=layer.dense_mlp)) for layer in config.layers)
    dense, sparse = count(config), count(replace(config, layers=layers))
    assert sparse[Component.EXPERTS] == experts * dense[Component.MLP]
    assert sparse[Component.ROUTER].parameters == len(layers) * config.hidden * experts
    assert sparse[Component.MLP].parameters == 0
    for component in (Component.EMBEDDING, Component.ATTENTION, Component.NORMS, Component.HEAD):
        assert sparse[component] == dense[component]


@pytest.mark.parametrize(
    ("name", "layers", "hidden"),
    [
        ("gpt2-1.5b", 48, 1600),
        ("gpt-neo-2.7b", 32, 2560),
        ("gpt-j-6b", 28, 4096),
        ("gpt-13b", 40, 5120),
        ("gpt-neox-20b", 44, 6144),
        ("gpt-50b", 62, 8192),
        ("gpt-87b", 48, 12288),
        ("lm-175b", 96, 12288),
        ("lm-530b", 105, 20480),
    ],
)
def test_dense_models_of_table_i(name, layers, hidden):
    """Matrices of the layers hold 12 M^2 L parameters; with embeddings the total is the printed size to 4 %."""
    model = paper_model(name)
    counts = count(model.config)
    assert counts[Component.ATTENTION].matrix + counts[Component.MLP].matrix == 12 * hidden**2 * layers
    assert abs(total(model.config).parameters / 1e9 / model.printed_billions - 1) < 0.04


@pytest.mark.parametrize(
    ("name", "expert", "other"),
    [
        ("1.3b-moe-128", 51_539_607_552, 805_306_368),
        ("2.4b-moe-128", 105_226_698_752, 1_644_167_168),
        ("8b-moe-128", 343_597_383_680, 5_368_709_120),
        ("24b-moe-128", 1_030_792_151_040, 16_106_127_360),
        ("47b-moe-128", 1_992_864_825_344, 31_138_512_896),
    ],
)
def test_sparse_models_of_table_ii(name, expert, other):
    """Experts hold (L/2) * 128 * 8 M^2 parameters and the rest of the layers 12 M^2 L - (L/2) * 8 M^2."""
    model = paper_model(name)
    counts = count(model.config)
    assert counts[Component.EXPERTS].matrix == expert
    assert counts[Component.ATTENTION].matrix + counts[Component.MLP].matrix == other
    assert abs((expert + other) / 1e9 / model.printed_billions - 1) < 0.01


def test_cache_of_the_largest_dense_model():
    """lm-530b: 105 layers, keys and values, 20480 elements, 4 bytes."""
    assert cache_bytes_per_token(paper_model("lm-530b").config) == 105 * 2 * 20480 * 4


def test_unknown_paper_model_lists_the_known():
    with pytest.raises(RequestError) as caught:
        paper_model("gpt-5")
    assert all(name in str(caught.value) for name in PAPER_MODELS)
