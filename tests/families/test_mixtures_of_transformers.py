"""The mixtures of experts that transformers knows: each is read, or refused with the reason."""

import re
from pathlib import Path

import pytest
import transformers

from twinfer.checkpoint.families import FAMILIES
from twinfer.checkpoint.family import find
from twinfer.checkpoint.fields import Fields
from twinfer.checkpoint.not_computed import NOT_COMPUTED
from twinfer.spec.errors import CheckpointError

EXPERTS = re.compile(r"^    (num_experts|num_local_experts|n_routed_experts|moe_num_experts|ffn_config)\b\s*:", re.M)
TYPE = re.compile(r'^    model_type = "(.+)"', re.M)
NOT_A_MODEL = {"dots3_note_vision_encoder"}
"""Parts of models that no config.json names by themselves."""


def mixtures() -> set[str]:
    """Return the `model_type` of every config class with a number of experts, as the source files have them."""
    found = set()
    for file in Path(transformers.__file__).parent.glob("models/*/configuration_*.py"):
        for text in re.split(r"^class ", file.read_text(), flags=re.M):
            if EXPERTS.search(text) and (named := TYPE.search(text)):
                found.add(named[1])
    return found - NOT_A_MODEL


def test_every_mixture_is_read_or_refused_with_a_reason() -> None:
    ours = {family.model_type for family in FAMILIES}
    assert len(mixtures()) > 40
    assert mixtures() - ours - set(NOT_COMPUTED) == set()
    assert not ours & set(NOT_COMPUTED)


@pytest.mark.parametrize("name", NOT_COMPUTED)
def test_the_refusal_says_why(name: str) -> None:
    with pytest.raises(
        CheckpointError, match=re.escape(f"model_type is {name!r}, which cannot be read: {NOT_COMPUTED[name]}")
    ):
        find(FAMILIES, Fields({"model_type": name}, "config.json: "))
