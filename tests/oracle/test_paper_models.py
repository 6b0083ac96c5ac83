"""The paper's models, reduced in size, on both paths."""

import pytest

from twinfer import load
from twinfer.compiled.path import CompiledPath
from twinfer.loading import open_checkpoint
from twinfer.oracle.baseline import Baseline
from twinfer.oracle.paths import assert_paths_agree
from twinfer.oracle.schedule import generation
from twinfer.spec.errors import RequestError
from twinfer.spec.moe import MoeConfig
from twinfer.spec.paper_models import PAPER_MODELS, reduced


@pytest.mark.parametrize("name", ["24b-moe-128/1024", "gpt2-1.5b/100"])
def test_reduced_models_run_on_both_paths(name: str) -> None:
    """24b-moe-128 with all of its 30 layers and 128 experts, whose choices both paths report."""
    source = open_checkpoint(name).source
    schedule = generation(((3, 1),), 1)
    compiled = CompiledPath(source, mode="eager", routes=True)
    result = assert_paths_agree(Baseline.of(source, runs=2), compiled, schedule)
    sparse = sum(isinstance(layer.mlp, MoeConfig) for layer in source.config.layers)
    assert (sparse, result.choices > 0) == ((15, True) if "moe" in name else (0, False))


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_only_sizes_are_reduced(name: str) -> None:
    """Layers, experts, recipes, placements and vocabulary stay; undivided it is the model itself."""
    whole = PAPER_MODELS[name].config
    config = reduced(f"{name}/32")
    assert config is not None
    assert reduced(f"{name}/1") == whole
    assert (config.hidden, config.vocabulary) == (whole.hidden // 32, whole.vocabulary)
    assert [type(layer.mlp) for layer in config.layers] == [type(layer.mlp) for layer in whole.layers]
    for own, theirs in zip(config.layers, whole.layers, strict=True):
        if isinstance(own.mlp, MoeConfig) and isinstance(theirs.mlp, MoeConfig):
            assert (own.mlp.router, own.mlp.expert.width) == (theirs.mlp.router, theirs.mlp.expert.width // 32)


def test_text_is_generated_from_token_ids() -> None:
    """By name, as from any other model; the same weights each time."""
    loaded = [load("1.3b-moe-128/256", path="reference", context=8) for _ in range(2)]
    one, other = (model.generate([[3, 1]], max_new_tokens=2).outputs() for model in loaded)
    assert one == other


@pytest.mark.parametrize("divisor", ["0", "3", "", "-2", "2.0", "x"])
def test_divisors_that_do_not_divide_are_refused(divisor: str) -> None:
    with pytest.raises(RequestError, match=r"it must be a divisor of 8192"):
        open_checkpoint(f"24b-moe-128/{divisor}")


def test_a_whole_model_has_no_weights() -> None:
    with pytest.raises(RequestError, match="or give 24b-moe-128/64, the same with random weights"):
        open_checkpoint("24b-moe-128")
