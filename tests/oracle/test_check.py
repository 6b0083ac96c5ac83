"""What a stranger sees who holds an implementation against the reference."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from twinfer.oracle.assertion import Mismatch
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.check import check_op, load_implementation, ops_table
from twinfer.oracle.table import OPS
from twinfer.spec.errors import RequestError, TwinferError

SDPA = '''
"""torch's attention, held against twinfer's."""

from torch.nn.functional import scaled_dot_product_attention


def attention(query_BTHD, key_BSKD, value_BSKD, visible_TS, scale):
    query, key, value = (x.transpose(1, 2) for x in (query_BTHD, key_BSKD, value_BSKD))
    mask = visible_TS if visible_TS.ndim == 2 else visible_TS[:, None]
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def without_scale(query_BTHD, key_BSKD, value_BSKD, visible_TS, scale):
    return attention(query_BTHD, key_BSKD, value_BSKD, visible_TS, 1.0)


not_a_function = 3
'''


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module in the current folder, as a stranger would have it."""
    (tmp_path / "my_kernels.py").write_text(SDPA)
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("stranger")
def test_torchs_attention_holds() -> None:
    result = check_op("attention", load_implementation("my_kernels:attention"), max_examples=150)
    assert result.holds, result.report
    assert result.cases >= 150
    assert 0 < result.largest_ratio <= 1
    assert result.rejected <= result.cases // 20
    assert result.report is result.smallest is result.snippet is None


@pytest.mark.usefixtures("stranger")
def test_a_wrong_one_fails_on_the_smallest_case_with_a_snippet_that_fails_too() -> None:
    """Without the scale, two keys and one element to a head are the least that shows it."""
    result = check_op("attention", load_implementation("my_kernels:without_scale"), max_examples=150)
    assert not result.holds
    assert result.report is not None
    assert result.snippet is not None
    assert result.smallest is not None
    assert "times what the budget allows" in result.report
    assert "'B': 1, 'T': 1, 'S': 2, 'H': 1, 'K': 1, 'D': 1" in result.smallest
    assert result.smallest in result.report
    with pytest.raises(Mismatch):
        exec(result.snippet, {})


@pytest.mark.parametrize("op", ["linear", "rotate", "quantize_rows", "keep_top_p"])
def test_every_fault_is_found_by_the_search(op: str) -> None:
    """Hypothesis looks where random drawing may not: what the default number of examples misses, nobody sees."""
    for name, wrong in OPS[op].mutants.items():
        assert not check_op(op, wrong, max_examples=200).holds, f"{op}: {name}"


def test_an_implementation_that_raises_fails_and_says_where() -> None:
    def picky(x: Tensor, weights: object) -> Tensor:
        if x.shape[-1] == 7:
            raise IndexError("seven is unlucky")
        return OPS["linear"].reference(x, weights)  # type: ignore[no-any-return]

    result = check_op("linear", picky, max_examples=500)
    assert not result.holds
    assert "raises IndexError: seven is unlucky" in str(result.report)
    assert "'I': 7" in str(result.smallest)


def test_wrong_arguments_are_the_implementations_failure() -> None:
    result = check_op("linear", lambda y: y, max_examples=5)
    assert not result.holds
    assert "unexpected keyword argument" in str(result.report)


def test_an_unsteady_implementation_fails() -> None:
    calls = iter(range(10**6))

    def unsteady(x: Tensor, weights: object) -> Tensor:
        out: Tensor = OPS["linear"].reference(x, weights)
        return out + next(calls) % 2

    assert not check_op("linear", unsteady, max_examples=50).holds


def test_a_check_repeats_itself() -> None:
    wrong = OPS["linear"].mutants["bias_dropped"]
    one, other = (check_op("linear", wrong, max_examples=100, seed=4) for _ in range(2))
    assert one == other


@pytest.mark.usefixtures("stranger")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("attention", "package.module:function"),
        ("my_kernels:", "package.module:function"),
        ("no_such_module:attention", "'no_such_module'"),
        ("broken:attention", "nothing_of_this_name"),
        ("my_kernels:atention", "has no 'atention'"),
        ("my_kernels:not_a_function", "cannot be called"),
    ],
)
def test_what_cannot_be_loaded_is_named(name: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        load_implementation(name)


def test_unknown_ops_and_counts_are_refused() -> None:
    with pytest.raises(TwinferError, match="attention"):
        check_op("atention", torch.relu)
    with pytest.raises(TwinferError, match="at least 1"):
        check_op("attention", torch.relu, max_examples=0)


def test_the_table_says_how_an_implementation_is_called() -> None:
    """The arguments listed are those of every call, and all that the reference needs."""
    rows = {row.name: row for row in ops_table()}
    assert rows.keys() == OPS.keys()
    for name, op in OPS.items():
        for seed in range(20):
            assert tuple(op.inputs(op.cases(RandomPicker(seed)))) == rows[name].arguments
        inspect.signature(op.reference).bind(**dict.fromkeys(rows[name].arguments))
    assert rows["attention"].guarantee == "BUDGET by elements"
    assert {row.guarantee.split()[0] for row in rows.values()} == {"BITWISE", "BUDGET", "DISCRETE", "STATISTICAL"}


def test_a_check_needs_no_hypothesis() -> None:
    """A case that fails is made smaller without it: strangers need install nothing."""
    script = """
import sys
sys.modules["hypothesis"] = None
import twinfer.oracle.verify, twinfer.oracle.paths, twinfer.oracle.calibration
from twinfer.oracle.check import check_op
from twinfer.oracle.table import OPS
assert not check_op("linear", OPS["linear"].mutants["bias_dropped"], 50).holds
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_a_property_that_is_broken_is_reported_and_seen_again() -> None:
    """Right on every number, but what is no number disappears."""

    def hides(logits_V: Tensor, k: int) -> Tensor:
        out: Tensor = OPS["keep_top_k"].reference(logits_V.nan_to_num(nan=-1e30), k)
        return out

    result = check_op("keep_top_k", hides, max_examples=50)
    assert not result.holds
    assert "breaks a property: " in str(result.report)
    assert "assert_obeys" in str(result.snippet)


def test_another_convention_is_named_and_taken() -> None:
    """Rotating by float32 angles is a fault by default, and right where the option says so."""
    wrong = OPS["rotate"].mutants["float32_angles"]
    result = check_op("rotate", wrong, max_examples=100)
    assert not result.holds
    assert "--option angles=float32" in str(result.report)
    assert check_op("rotate", wrong, max_examples=100, options=["angles=float32"]).holds
    with pytest.raises(RequestError, match="angles=float32"):
        check_op("rotate", wrong, options=["angles=float16"])


@pytest.mark.parametrize("op", ["keep_top_k", "next_token"])
def test_ties_are_a_convention(op: str) -> None:
    """Of equal logits ours keeps the lowest ids; others need only say so, and nothing else is forgiven them."""
    record = OPS[op]
    higher = record.mutants["ties_to_the_higher_id"]
    assert "--option ties=any" in str(check_op(op, higher, max_examples=200).report)
    assert check_op(op, higher, max_examples=200, options=["ties=any"]).holds
    for name, wrong in record.mutants.items():
        if "tie" not in name:
            assert not check_op(op, wrong, max_examples=200, options=["ties=any"]).holds, name
