"""How a folder says that texts become vectors: read whole, and what is not computed is named when it is asked for."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinfer.checkpoint import EmbeddingRecipe
from twinfer.checkpoint.config_json import read, to_json
from twinfer.checkpoint.embedding_recipe import gguf_recipe, recipe_of
from twinfer.checkpoint.fields import Fields
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import draw_encoder_config
from twinfer.spec.config import Pooling
from twinfer.spec.errors import CheckpointError

MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
NAMES = ("cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


ENCODER = draw_encoder_config(RandomPicker(0))


def modules(*kinds: str) -> list[dict[str, Any]]:
    """modules.json as the library writes it."""
    return [
        {"idx": index, "name": str(index), "path": f"{index}_{kind}" if index else "", "type": f"library.models.{kind}"}
        for index, kind in enumerate(kinds)
    ]


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def usual(**changed: Any) -> dict[str, Any]:
    """A folder's files, some of them replaced."""
    files = {
        "modules.json": modules("Transformer", "Pooling", "Normalize"),
        "1_Pooling/config.json": {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True},
        "sentence_bert_config.json": {"max_seq_length": 16, "do_lower_case": False},
    }
    return {**files, **changed}


TRANSFORMER_6 = {
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}
"""sentence_bert_config.json as sentence-transformers 6 writes it."""
POOLING_6 = {"embedding_dimension": 8, "pooling_mode": "mean", "include_prompt": True}


@pytest.mark.parametrize(
    ("config", "tokenizer", "most"),
    [
        ({"model_max_length": 256}, None, 256),
        ({"model_max_length": 512}, {"truncation": {"max_length": 256}}, 256),
        ({"model_max_length": 10**30}, {"truncation": {"max_length": 128}}, 128),
        ({"model_max_length": 1e30}, {"truncation": None}, None),
        (None, {"truncation": {"max_length": 16}}, 16),
        ({}, {}, None),
    ],
)
def test_newer_folders_have_their_limit_in_the_tokenizers_files(
    tmp_path: Path, config: object, tokenizer: object, most: int | None
) -> None:
    """The fewer tokens of the two, as the tokenizer itself cuts texts."""
    files = {"sentence_bert_config.json": TRANSFORMER_6, "1_Pooling/config.json": POOLING_6}
    written = {"tokenizer_config.json": config, "tokenizer.json": tokenizer}
    folder = write(tmp_path, usual(**files, **{name: each for name, each in written.items() if each is not None}))
    assert recipe_of(folder, ENCODER) == EmbeddingRecipe(pooling=Pooling.MEAN, normalize=True, most_tokens=most)


@pytest.mark.parametrize(
    "changed",
    [
        {"transformer_task": "sequence-classification"},
        {"module_output_name": "scores"},
        {"modality_config": {"text": {"method": "forward", "method_output_name": "logits"}}},
        {"modality_config": {**TRANSFORMER_6["modality_config"], "image": {"method": "forward"}}},  # type: ignore[dict-item]
        {"surprise": 1},
    ],
)
def test_other_tasks_are_named_and_leave_the_limit(tmp_path: Path, changed: dict[str, Any]) -> None:
    """Which holds for whatever pooling is asked for instead."""
    limit = {"tokenizer_config.json": {"model_max_length": 256}}
    transformer = {**TRANSFORMER_6, **changed}
    recipe = recipe_of(write(tmp_path, usual(**{"sentence_bert_config.json": transformer}, **limit)), ENCODER)
    assert (recipe.pooling, recipe.normalize, recipe.most_tokens) == (None, None, 256)
    assert f"{next(iter(changed))} is" in recipe.unknown


def test_a_folder_that_says_nothing_means_the_mean_not_scaled(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, ENCODER)
    assert recipe == EmbeddingRecipe()
    assert (recipe.pooling, recipe.normalize, recipe.most_tokens, recipe.unknown) == (Pooling.MEAN, False, None, "")


def test_what_the_files_say_is_read(tmp_path: Path) -> None:
    mean = EmbeddingRecipe(pooling=Pooling.MEAN, normalize=True, most_tokens=16)
    assert recipe_of(write(tmp_path / "mean", usual()), ENCODER) == mean
    cls = usual(**{"1_Pooling/config.json": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}})
    cls["modules.json"] = modules("Transformer", "Pooling")
    cls["sentence_bert_config.json"] = {"max_seq_length": None, "do_lower_case": True}
    found = recipe_of(write(tmp_path / "cls", cls), ENCODER)
    assert found == EmbeddingRecipe(pooling=Pooling.CLS, normalize=False, lower_case=True)
    newer = usual(
        **{"1_Pooling/config.json": {"embedding_dimension": 8, "pooling_mode": "cls", "include_prompt": True}}
    )
    del newer["sentence_bert_config.json"]
    assert recipe_of(write(tmp_path / "newer", newer), ENCODER) == EmbeddingRecipe(pooling=Pooling.CLS, normalize=True)


@given(on=st.lists(st.booleans(), min_size=6, max_size=6))
def test_one_pooling_mode_that_is_computed_is_used_and_all_others_are_named(
    on: list[bool], tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = {f"pooling_mode_{mode}": flag for mode, flag in zip(MODES, on, strict=True)}
    recipe = recipe_of(write(tmp_path_factory.mktemp("folder"), usual(**{"1_Pooling/config.json": config})), ENCODER)
    names = [name for name, flag in zip(NAMES, on, strict=True) if flag]
    assert (recipe.normalize, recipe.most_tokens) == (True, 16)
    if names in (["mean"], ["cls"]):
        assert (recipe.pooling, recipe.unknown) == (Pooling(names[0]), "")
    else:
        assert recipe.pooling is None
        assert f"1_Pooling/config.json: the pooling is {names}, which is not computed here" in recipe.unknown


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"modules.json": modules("Transformer", "Pooling", "Dense")}, "['Transformer', 'Pooling', 'Dense']; only"),
        ({"modules.json": modules("Transformer")}, "the modules are ['Transformer']; only"),
        ({"modules.json": modules("Transformer", "Normalize", "Pooling")}, "'Normalize', 'Pooling']; only"),
        ({"modules.json": [{**modules("Transformer")[0], "kwargs": ["x"]}]}, 'module 0: kwargs is ["x"]; this version'),
        ({"modules.json": [{**modules("Transformer")[0], "path": "../x"}]}, 'path is "../x"; it must be a folder'),
        ({"modules.json": [{"path": ""}]}, "module 0: type is missing"),
        (
            {"modules.json": [{**modules("Transformer")[0], "path": "0_Here"}, *modules("", "Pooling")[1:]]},
            "0_Here; open that folder instead",
        ),
        ({"1_Pooling/config.json": {"pooling_mode_quantum": True}}, "pooling_mode_quantum is true; this version"),
        ({"1_Pooling/config.json": {"pooling_mode": ["cls", "mean"]}}, 'pooling_mode is ["cls", "mean"]; it must be a'),
        ({"sentence_bert_config.json": {"max_seq_length": 0}}, "max_seq_length is 0; it must be a whole number"),
        ({"sentence_bert_config.json": {"speed": 9}}, "speed is 9; this version does not know"),
        ({"config_sentence_transformers.json": {"default_prompt_name": "query"}}, 'default_prompt_name is "query"'),
    ],
)
def test_what_is_not_computed_is_kept_for_when_it_is_asked_for(
    files: dict[str, Any], says: str, tmp_path: Path
) -> None:
    recipe = recipe_of(write(tmp_path, usual(**files)), ENCODER)
    assert (recipe.pooling, recipe.normalize) == (None, None)
    assert says in recipe.unknown
    assert recipe.unknown.isprintable()


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"modules.json": "{"}, "modules.json is not valid JSON"),
        ({"modules.json": "[" * 100_000}, "modules.json is not valid JSON"),
        ({"modules.json": {}}, "modules.json must hold a list of modules"),
        ({"modules.json": [1]}, "modules.json must hold a list of modules"),
        ({"1_Pooling/config.json": "[]"}, "holds a JSON list; it must hold an object"),
    ],
)
def test_malformed_files_are_refused(files: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        recipe_of(write(tmp_path, usual(**files)), ENCODER)
    assert says in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write(tmp_path, usual())
    (tmp_path / "1_Pooling" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="is missing, though modules"):
        recipe_of(tmp_path, ENCODER)


def test_a_gguf_file_names_its_pooling() -> None:
    def recipe(**metadata: int) -> EmbeddingRecipe:
        values = {f"bert.{name}": value for name, value in metadata.items()}
        return gguf_recipe(Fields({"general.architecture": "bert", **values}, "file: "))

    assert recipe() == recipe(pooling_type=0) == recipe(pooling_type=1) == EmbeddingRecipe()
    assert recipe(pooling_type=2) == EmbeddingRecipe(pooling=Pooling.CLS)
    assert recipe(pooling_type=3).pooling is None
    assert recipe(pooling_type=3).unknown.startswith("file: bert.pooling_type is 3; it must be 0 (none), 1 (mean) or")


@given(
    pooling=st.sampled_from([None, *Pooling]),
    normalize=st.sampled_from([None, True, False]),
    most_tokens=st.none() | st.integers(1, 9),
    lower_case=st.booleans(),
)
def test_a_recipe_survives_json(
    pooling: Pooling | None, normalize: bool | None, most_tokens: int | None, lower_case: bool
) -> None:
    """As the twinfer form keeps it."""
    how: dict[str, Any] = {"pooling": pooling, "normalize": normalize, "most_tokens": most_tokens}
    recipe = EmbeddingRecipe(**how, lower_case=lower_case, unknown="modules.json: \u2026")
    assert read(EmbeddingRecipe, json.loads(json.dumps(to_json(recipe))), "embedding") == recipe


def test_a_causal_encoders_own_vector_is_not_guessed(tmp_path: Path) -> None:
    """CLIP's is its end token's, projected: whoever wants another must say so."""
    layers = tuple(replace(each, attention=replace(each.attention, causal=True)) for each in ENCODER.layers)
    recipe = recipe_of(tmp_path, replace(ENCODER, layers=layers))
    assert recipe.pooling is None
    assert "its end token's hidden vector by a projection" in recipe.unknown
