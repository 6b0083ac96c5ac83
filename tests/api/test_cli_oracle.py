"""The commands that speak for the oracle: ops, check, verify."""

import json
from dataclasses import asdict, replace
from functools import partial

import pytest

import twinfer.compiled.path
import twinfer.oracle.verify as oracle_verify
from twinfer import load
from twinfer.commands import check as check_command
from twinfer.commands import ops as ops_command
from twinfer.commands import verify as verify_command
from twinfer.commands.main import main
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.check import check_op, ops_table
from twinfer.oracle.models import RandomSource, draw_moe
from twinfer.oracle.paths import FreeRun, PathComparison, Tie
from twinfer.oracle.routes import RouteTie
from twinfer.oracle.schedule import Close, Extend, Open
from twinfer.oracle.table import OPS
from twinfer.oracle.verify import OpVerdict, VerifyResult
from twinfer.reference.components import DEFAULT
from twinfer.reference.path import ReferencePath
from twinfer.spec.config import Storage
from twinfer.spec.decoder import Path

KERNELS = """
import torch

print("a module may print what it likes")

def right(*, x, weights, epsilon):
    wide = x.double()
    out = wide * (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weights.gain_M.double()
    return out.to(x.dtype)

def wrong(*, x, weights, epsilon):
    return right(x=x, weights=weights, epsilon=epsilon) * 1.01

def raising(*, x, weights, epsilon):
    raise OSError("no such accelerator")

number = 3
"""


@pytest.fixture(autouse=True)
def kernels(tmp_path, monkeypatch):
    """A stranger's module in the current folder."""
    (tmp_path / "strangers_kernels.py").write_text(KERNELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_ops_lists_every_op(capsys):
    """Table and JSON name each op, with what an implementation is called with."""
    assert main(["ops", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["ops"]}
    assert list(rows) == list(OPS)
    assert rows["rms_norm"]["arguments"] == ["x", "weights", "epsilon"]
    assert all(row["guarantee"] and row["axes"] and row["paper"] for row in rows.values())
    assert main(["ops"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in OPS)


def test_a_right_implementation_passes(capsys):
    words = ["check", "rms_norm", "--impl", "strangers_kernels:right", "--max-examples", "20"]
    assert main(words) == 0
    assert "rms_norm: strangers_kernels:right holds in 20 cases" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["holds"]
    assert report["snippet"] is None


def test_a_wrong_implementation_fails_with_a_snippet_that_reproduces_it(capsys):
    """Exit status 1; the snippet, pasted, raises."""
    words = ["check", "rms_norm", "--impl", "strangers_kernels:wrong", "--max-examples", "50"]
    assert main(words) == 1
    assert "strangers_kernels:wrong fails after" in capsys.readouterr().out
    assert main([*words, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["holds"]
    with pytest.raises(AssertionError, match="rms_norm"):
        exec(report["snippet"], {})


def test_an_implementation_that_raises_fails(capsys):
    assert main(["check", "rms_norm", "--impl", "strangers_kernels:raising"]) == 1
    assert "no such accelerator" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["check", "rms_norms", "--impl", "strangers_kernels:right"], "no op 'rms_norms'; the ops are linear"),
        (["check", "rms_norm"], "required: --impl"),
        (["check", "rms_norm", "--impl", "strangers_kernels"], "must read package.module:function"),
        (["check", "rms_norm", "--impl", "nowhere:right"], "'nowhere' of 'nowhere:right' cannot be imported"),
        (["check", "rms_norm", "--impl", "strangers_kernels:absent"], "has no 'absent'"),
        (["check", "rms_norm", "--impl", "strangers_kernels:number"], "cannot be called"),
        (["check", "rms_norm", "--impl", "math:sqrt", "--max-examples", "0"], "max_examples is 0"),
        (["verify", "lm-175b"], "there are no weights of it"),
        (["verify", "x", "--schedules", "0"], "'0' is not a number of at least 1"),
        (["verify", "x", "--storage", "int5"], "invalid choice: 'int5'"),
    ],
)
def test_bad_requests_are_one_line(words, says, capsys):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.splitlines()[-1].startswith("twinfer: error: ")


def keys_of(value):
    """Every key of JSON-like data, at any depth."""
    if isinstance(value, dict):
        return set(value).union(*map(keys_of, value.values()))
    return set().union(*map(keys_of, value)) if isinstance(value, list | tuple) else set()


def test_the_help_describes_every_key_of_the_json():
    """Of verify with ties of both kinds, of a check and of the ops: each key stands in quotes in the command's help."""
    same = {"step": 0, "sequence": 0, "position": 1, "gap": 0.0, "allowed": 0.0}
    tie = Tie(**same, chosen=1, best=2)
    model = PathComparison(ties=[tie], route_ties=[RouteTie(**same, layer=0, chosen=(1,), best=(2,))])
    ran = FreeRun(truth=(1,), candidate=(2,), tie=tie)
    op = {"op": "linear", "function": "linear", "guarantee": "BUDGET", "cases": 1, "rejected": 0, "largest_ratio": 0.5}
    ops = (OpVerdict(**op, path=Path.COMPILED, complaint=None),)
    result = VerifyResult(storage=Storage.INT8, drawn=(), model=model, free_run=ran, ops=ops)
    checked = check_op("scale_temperature", OPS["scale_temperature"].reference, max_examples=1)
    given = [
        (verify_command, verify_command.report_of(result)),
        (check_command, asdict(checked)),
        (ops_command, [asdict(row) for row in ops_table()]),
    ]
    for command, report in given:
        missing = {key for key in keys_of(report) if f'"{key}"' not in command.EPILOG}
        assert not missing, f"{command.NAME} --help does not describe {missing}"


@pytest.mark.parametrize("right", [True, False])
def test_verify_tells_a_right_path_from_a_wrong_one(right, tiny, opens, monkeypatch, capsys):
    """A path that computes as the reference does holds; one whose attention is scaled a little differently does not."""

    def attention(query_BTHD, key_BSKD, value_BSKD, *, scale, **how):
        return DEFAULT.attention(query_BTHD, key_BSKD, value_BSKD, scale=1.05 * scale, **how)

    components = DEFAULT if right else replace(DEFAULT, attention=attention)

    def load_candidate(checkpoint, path, *how, report, routes):
        model = load(checkpoint, "reference", *how)
        return replace(model, decoder=ReferencePath(checkpoint.source, storage=model.storage, components=components))

    opens(tiny)
    monkeypatch.setattr(verify_command, "load", load_candidate)
    words = ["verify", "tiny", "--schedules", "2", "--cases", "2", "--storage", "int8"]
    assert main([*words, "--json"]) == (0 if right else 1)
    report = json.loads(capsys.readouterr().out)
    assert report["holds"] is report["paths"]["holds"] is right
    assert report["storage"] == "int8"
    assert bool(report["paths"]["failures"]) is not right
    assert {row["op"] for row in report["ops"]} == {op.name for op in OPS.values() if op.fast}
    assert all(row["holds"] for row in report["ops"])
    assert main(words) == (0 if right else 1)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == ("everything holds" if right else "NOT everything holds")


@pytest.mark.parametrize("mixture", [True, False])
def test_verify_judges_every_choice_that_the_compiled_path_makes(mixture, tiny, opens, monkeypatch, capsys):
    """As many choices as tokens, in a model whose second layer has experts; a dense model has none to report."""
    config = tiny.config
    if mixture:
        dense, other = config.layers
        config = replace(config, layers=(dense, replace(other, mlp=draw_moe(RandomPicker(1), other.mlp))))
    opens(replace(tiny, source=RandomSource(config), config=config))
    compiled = twinfer.compiled.path.CompiledPath
    monkeypatch.setattr(twinfer.compiled.path, "CompiledPath", partial(compiled, mode="eager"))
    monkeypatch.setattr(oracle_verify, "OPS", {})
    words = ["verify", "tiny", "--schedules", "2", "--cases", "1"]
    assert main([*words, "--json"]) == 0
    paths = json.loads(capsys.readouterr().out)["paths"]
    schedules = [eval(drawn, {"Open": Open, "Extend": Extend, "Close": Close}) for drawn in paths["schedules"]]
    steps = [step for drawn in schedules for step in drawn if isinstance(step, Extend)]
    tokens = sum(len(new) for step in steps for new in step.new_tokens)
    assert paths["choices"] == (tokens if mixture else 0)
    assert paths["left_out"] == 0
    assert main(words) == 0
    told = f"  {tokens} choices of experts were compared, as the path reports them; 0 are others than the truth's"
    assert (told in capsys.readouterr().out) == mixture
