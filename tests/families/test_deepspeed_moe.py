"""DeepSpeed's mixtures in Megatron's GPT, beside a module with DeepSpeed's names that computes what DeepSpeed does.

The module is written after DeepSpeed's `MoE`, `TopKGate`, `Experts` and `top1gating`, `top2gating`, `topkgating` (their
one-hot masks and einsums), with room for every token, no noise and no second choice drawn at random.

Shapes: S tokens, E experts, C capacity, M hidden.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config

from twinfer.checkpoint import open_model
from twinfer.compiled.path import CompiledPath
from twinfer.oracle.baseline import Baseline
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.paths import assert_paths_agree
from twinfer.oracle.schedule import draw_schedule
from twinfer.spec.errors import CheckpointError, ConfigError, WeightError
from twinfer.spec.weights import LayerWeights, MoeWeights

from ..shards import assert_shards_join
from .conftest import AGREEMENT, Altered, Twins, widened
from .experts_family import router_with
from .test_megatron_gpt import SIZES, GPT2LMHeadModel


class ParallelMLP(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(hidden, width)
        self.dense_4h_to_h = nn.Linear(width, hidden)

    def forward(self, x_SM: Tensor) -> Tensor:
        out: Tensor = self.dense_4h_to_h(nn.functional.gelu(self.dense_h_to_4h(x_SM), approximate="tanh"))
        return out


class Gate(nn.Module):
    def __init__(self, hidden: int, experts: int, k: int) -> None:
        super().__init__()
        self.wg, self.k = nn.Linear(hidden, experts, bias=False), k

    def forward(self, x_SM: Tensor) -> tuple[Tensor, Tensor]:
        """Return combine weights and dispatch mask, [S, E, C] each, with C = S: every token finds room."""
        logits_SE = self.wg(x_SM)
        gates_SE = logits_SE.softmax(-1)
        tokens, experts = gates_SE.shape
        masked, masks, offset_E = gates_SE.clone(), [], torch.zeros(experts, dtype=torch.long)
        combine_SEC = gates_SE.new_zeros(tokens, experts, tokens * self.k)
        for _ in range(self.k):
            mask_SE = nn.functional.one_hot(masked.argmax(-1), experts)
            masks.append((mask_SE, torch.cumsum(mask_SE, 0) - 1 + offset_E))
            offset_E = offset_E + mask_SE.sum(0)
            masked = masked.masked_fill(mask_SE.bool(), -torch.inf)
        chosen_kS = torch.stack([(gates_SE * mask_SE).sum(-1) for mask_SE, _ in masks])
        if self.k > 1:
            chosen_kS = chosen_kS / chosen_kS.sum(0).clamp_min(torch.finfo(chosen_kS.dtype).eps)
        for (mask_SE, location_SE), gate_S in zip(masks, chosen_kS, strict=True):
            slot_SC = nn.functional.one_hot((location_SE * mask_SE).sum(-1), tokens * self.k)
            combine_SEC = combine_SEC + torch.einsum("se,sc->sec", gate_S[:, None] * mask_SE, slot_SC.to(gate_S))
        return combine_SEC, combine_SEC.bool()


class Experts(nn.Module):
    def __init__(self, hidden: int, width: int, experts: int) -> None:
        super().__init__()
        self.deepspeed_experts = nn.ModuleList([ParallelMLP(hidden, width) for _ in range(experts)])

    def forward(self, x_ECM: Tensor) -> Tensor:
        return torch.stack([expert(x_CM) for expert, x_CM in zip(self.deepspeed_experts, x_ECM, strict=True)])


class MOELayer(nn.Module):
    def __init__(self, hidden: int, width: int, experts: int, k: int) -> None:
        super().__init__()
        self.gate, self.experts = Gate(hidden, experts, k), Experts(hidden, width, experts)

    def forward(self, x_SM: Tensor) -> Tensor:
        combine_SEC, dispatch_SEC = self.gate(x_SM)
        dispatched_ECM = torch.einsum("sec,sm->ecm", dispatch_SEC.to(x_SM), x_SM)
        return torch.einsum("sec,ecm->sm", combine_SEC, self.experts(dispatched_ECM))


class MoE(nn.Module):
    def __init__(self, hidden: int, width: int, experts: int, k: int, *, use_residual: bool) -> None:
        super().__init__()
        self.deepspeed_moe = MOELayer(hidden, width, experts, k)
        if use_residual:
            self.mlp, self.coefficient = ParallelMLP(hidden, width), nn.Linear(hidden, 2)

    def forward(self, x_BTM: Tensor) -> Tensor:
        x_SM = x_BTM.flatten(0, 1)
        out_SM = self.deepspeed_moe(x_SM)
        if hasattr(self, "coefficient"):
            mix_S2 = self.coefficient(x_SM).softmax(-1)
            out_SM = out_SM * mix_S2[:, 0:1] + self.mlp(x_SM) * mix_S2[:, 1:]
        result: Tensor = out_SM.view(x_BTM.shape)
        return result


class GptMoE(GPT2LMHeadModel):
    """GPT-2 with DeepSpeed's experts in these layers, saved as Megatron-DeepSpeed names it."""

    def __init__(self, config: GPT2Config, *, numbers: dict[int, int], arguments: dict[str, Any]) -> None:
        super().__init__(config, MappingProxyType({"experts": arguments}))
        for index, experts in numbers.items():
            top_k, residual = arguments.get("topk", 1), arguments.get("mlp_type") == "residual"
            width = config.n_inner or 4 * config.n_embd
            self.transformer.h[index].mlp = MoE(config.n_embd, width, experts, top_k, use_residual=residual)


class MoETwins(Twins):
    """A drawn module, and what our files' reader makes of what it saves."""

    def __init__(self, made: Callable[[], GptMoE], seed: int, folder: Path) -> None:
        with widened():
            self.theirs = made().eval()
        self.theirs.set_attn_implementation("eager")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.theirs.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        self.theirs.save_pretrained(str(folder))
        self.source = open_model(str(folder)).source
        vocabulary = self.source.config.vocabulary
        self.prompts = [torch.randint(vocabulary, (length,), generator=generator) for length in (11, 1, 6)]


CONFIG = GPT2Config(**SIZES | {"n_layer": 4, "n_inner": 10, "activation_function": "gelu_new"})
MADE = {
    "top-1 in every other layer": partial(GptMoE, CONFIG, numbers={1: 4, 3: 4}, arguments={"num_experts": [4]}),
    "top-2": partial(GptMoE, CONFIG, numbers={1: 4, 3: 4}, arguments={"num_experts": 4, "topk": 2}),
    "top-3 in every layer": partial(
        GptMoE,
        CONFIG,
        numbers=dict.fromkeys(range(4), 5),
        arguments={"num_experts": [5], "topk": 3, "expert_interval": 1},
    ),
    "a residual pyramid": partial(
        GptMoE, CONFIG, numbers={1: 2, 3: 6}, arguments={"num_experts": [2, 6], "mlp_type": "residual"}
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_deepspeed_s_mixtures(name: str, tmp_path: Path) -> None:
    """Both paths compute what the module does, ragged and cached, and ranks can share the files."""
    twins = MoETwins(MADE[name], 3, tmp_path)
    for cached in (False, True):
        difference = twins.difference(cached=cached)
        assert difference <= AGREEMENT, f"{difference:.2e}"
    assert_shards_join(twins.source)
    schedule = draw_schedule(RandomPicker(3), twins.source.config)
    compiled = CompiledPath(twins.source, mode="eager", routes=True)
    assert_paths_agree(Baseline.of(twins.source), compiled, schedule)


def _mix_swapped(weights: LayerWeights) -> LayerWeights:
    mlp = weights.mlp
    if not isinstance(mlp, MoeWeights):
        return weights
    assert mlp.coefficient is not None
    assert mlp.coefficient.bias_N is not None
    swapped = replace(
        mlp.coefficient, weight_NI=mlp.coefficient.weight_NI.flip(0), bias_N=mlp.coefficient.bias_N.flip(0)
    )
    return replace(weights, mlp=replace(mlp, coefficient=swapped))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("top-1 in every other layer", router_with(renormalize=True)),
        ("top-2", router_with(renormalize=False)),
        ("a residual pyramid", {"on_layer": _mix_swapped}),
    ],
)
def test_wrong_mappings_are_seen(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    twins = MoETwins(MADE[name], 3, tmp_path)
    assert twins.difference(Altered(twins.source, **changes)) > 1000 * AGREEMENT


def test_capacity_is_said_to_be_none(tmp_path: Path) -> None:
    """Whoever opens a model that was trained with dropped tokens is told that none is dropped here."""
    MADE["top-2"]().save_pretrained(str(tmp_path))
    assert any("no token is dropped" in note for note in open_model(str(tmp_path)).source.notes)


EXPERT = "language_model.encoder.layers.1.mlp.deepspeed_moe.experts.deepspeed_experts.{}.dense_h_to_4h.weight"


def _one_more(tensors: dict[str, Tensor]) -> None:
    tensors[EXPERT.format(4)] = tensors[EXPERT.format(3)].clone()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors.pop(EXPERT.format(2)), r"lacks .*layers\.1\..*deepspeed_experts\.2\.dense_h_to_4h"),
        (_one_more, r"holds .*layers\.1\..*deepspeed_experts\.4\.dense_h_to_4h\.weight, which .* does not have"),
    ],
)
def test_experts_that_do_not_fit_are_named(
    change: Callable[[dict[str, Tensor]], Any], says: str, tmp_path: Path
) -> None:
    MADE["top-2"]().save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightError, match=says):
        open_model(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_experts": [4, 4, 4]}, "num_experts is .*one number, or one for each of the 2 layers with experts"),
        ({"topk": 5}, "top_k is 5; .*which are 4"),
        ({"mlp_type": "shared"}, "mlp_type is .*one of standard, residual"),
    ],
)
def test_arguments_that_fit_no_mixture_are_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    MADE["top-2"]().save_pretrained(str(tmp_path))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=says):
        open_model(str(tmp_path))


def test_files_of_single_experts_are_pickles(tmp_path: Path) -> None:
    """As DeepSpeed writes them; the refusal says what to make of them."""
    with TemporaryDirectory() as folder:
        MADE["top-2"]().save_pretrained(folder)
        (tmp_path / "config.json").write_text((Path(folder) / "config.json").read_text())
    for expert in range(3):
        (tmp_path / f"layer_0_expert_{expert}_mp_rank_00_model_states.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"layer_0_expert_0_.* and 2 more pickles of single experts.*save_file"):
        open_model(str(tmp_path))
