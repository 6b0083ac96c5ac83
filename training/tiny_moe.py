"""Train `tiny-moe`, the mixture of experts that comes with twinfer, and the dense model that it is measured against.

    apt-get install bible-kjv bible-kjv-text               the text: King James Version, public domain
    python training/tiny_moe.py runs/moe-0 --seed 0
    python training/tiny_moe.py runs/dense-0 --seed 0 --dense
    python training/ship.py export runs/moe-0 tiny-moe     the folder that twinfer opens

A token is a byte. Byte 0 ends a text, here a chapter; a newline ends a verse. Every tenth book from the eighth (Ruth,
Job, Hosea, Zechariah, Galatians, Hebrews; 5.3 % of the bytes) is held out for validation.

The dense model has the same active size: where the mixture has experts, its MLP is as wide as the experts that serve a
token and the residual MLP together. Both see the same bytes in the same order, by the same schedule. Matrices are
trained by Muon (Jordan 2024: the momentum's nearest orthogonal matrix is the step), everything else by AdamW; products
are bfloat16, weights float32. A run that is interrupted goes on from its last checkpoint when it is started again.

Shapes: B batch, T tokens, M hidden, V vocabulary, H heads, D head size, E experts, K experts a token, F intermediate,
N outputs and I inputs of a matrix, S sequences.
"""

import argparse
import json
import math
import re
import subprocess
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from twinfer.spec.config import (
    Activation,
    AttentionConfig,
    Head,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    NormKind,
    RotaryConfig,
    RotaryLayout,
)
from twinfer.spec.moe import MoeConfig, router
from twinfer.spec.shapes import embedding_shapes, head_shapes, is_matrix, layer_shapes, trained

HIDDEN, HEADS, HEAD_SIZE, CONTEXT = 128, 2, 64, 512
WIDTH, EXPERT_WIDTH, RESIDUAL_WIDTH = 128, 144, 128
EXPERTS, TOP_K = 8, 2
WEIGHT_SCALE = 2.0
"""Multiplies the renormalized weights of the chosen experts, so that two of them add as much as a dense MLP does."""
KINDS = ("dense", "moe", "dense", "moe", "dense", "residual")
ROTARY_BASE = 10_000.0
END = 0
"""The byte that ends a text."""

CYCLES, STEPS = 2, 1200
"""The learning rate falls to almost nothing within each cycle of so many steps, and starts anew (Loshchilov 2016)."""
BATCH = 2048
"""Bytes a step."""
SHORT, LONG_FROM = 256, 0.8
"""Sequences hold 256 bytes, and `CONTEXT` in the last fifth of a cycle."""
MATRIX_RATE, OTHER_RATE, DECAY = 0.02, 0.005, 0.1
BALANCE = 0.01
"""Weight of the load-balancing loss (Fedus et al. 2021, eq. 4), which is 1 where every expert serves equally many."""

Weights = dict[str, Tensor]
"""By their dotted names in `spec/weights.py`, behind `embedding.`, `0.` (a layer) or `head.`."""


# ---- The text


def books() -> list[str]:
    """Return the 66 books as the `bible` program prints them: a verse a line, a zero byte after each chapter."""
    printed = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True).stdout
    chapters: dict[str, dict[str, str]] = {}
    for book, chapter, verse in re.findall(r"^(\d?[A-Za-z]+)(\d+):\d+ (.*)$", printed, re.MULTILINE):
        of_book = chapters.setdefault(book, {})
        of_book[chapter] = of_book.get(chapter, "") + verse + "\n"
    return ["".join(text + chr(END) for text in of_book.values()) for of_book in chapters.values()]


def parts(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return the bytes to train on, and those held out."""
    held_out = texts[7::10]
    return as_bytes("".join(text for text in texts if text not in held_out)), as_bytes("".join(held_out))


def as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


# ---- The models


def mixture_config() -> ModelConfig:
    """Return tiny-moe: experts in every other layer, those of the last beside a residual MLP."""
    norm = NormConfig(kind=NormKind.RMS, epsilon=1e-5)
    attention = AttentionConfig(
        heads=HEADS,
        kv_heads=1,
        head_size=HEAD_SIZE,
        scale=HEAD_SIZE**-0.5,
        rotary=RotaryConfig(layout=RotaryLayout.HALF_SPLIT, size=HEAD_SIZE),
    )
    moe = MoeConfig(
        router=router("gshard", experts=EXPERTS, top_k=TOP_K, scale=WEIGHT_SCALE), expert=_mlp(EXPERT_WIDTH)
    )
    mlps = {"dense": _mlp(WIDTH), "moe": moe, "residual": replace(moe, residual=_mlp(RESIDUAL_WIDTH))}
    return ModelConfig(
        family="tiny-moe",
        hidden=HIDDEN,
        vocabulary=256,
        context=CONTEXT,
        layers=tuple(LayerConfig(norm=norm, attention=attention, mlp=mlps[kind]) for kind in KINDS),
        final_norm=norm,
        learned_positions=False,
        head=Head.TIED,
        logit_scale=HIDDEN**-0.5,
    )


def _mlp(width: int) -> MlpConfig:
    return MlpConfig(width=width, activation=Activation.SILU, gated=True)


def dense_config() -> ModelConfig:
    """Return the model whose MLPs are as wide as what serves one token in tiny-moe."""
    config = mixture_config()
    return replace(config, layers=tuple(replace(each, mlp=_mlp(_active_width(each.mlp))) for each in config.layers))


def _active_width(mlp: MlpConfig | MoeConfig) -> int:
    if isinstance(mlp, MlpConfig):
        return mlp.width
    return mlp.router.top_k * mlp.expert.width + (mlp.residual.width if mlp.residual else 0)


def drawn(config: ModelConfig, seed: int) -> Weights:
    """Draw the first weights: normal, of variance 1 / I; gains are 1, and so is the variance of the token table.

    The one bias, of the mix of experts and residual MLP, is 0 and stays so: it is not trained.
    """
    generator = torch.Generator().manual_seed(seed)
    named = {"embedding": embedding_shapes(config), "head": head_shapes(config)}
    named |= {str(index): layer_shapes(layer, config.hidden) for index, layer in enumerate(config.layers)}
    weights = {}
    for part, shapes in named.items():
        for name, shape in trained(shapes).items():
            spread = 1.0 if name == "token_VW" else shape[-1] ** -0.5
            if len(shape) == 1:
                weights[f"{part}.{name}"] = torch.full(shape, 0.0 if name.endswith("bias_N") else 1.0)
            else:
                weights[f"{part}.{name}"] = spread * torch.randn(shape, generator=generator)
    return weights


def logits(token_BT: Tensor, weights: Weights, config: ModelConfig, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the logits [B, T, V] and the load-balancing loss; linear products are in the compute dtype."""
    narrow = {name: weight.to(compute) for name, weight in weights.items()}
    x_BTM = F.embedding(token_BT, weights["embedding.token_VW"])
    balance = torch.zeros(())
    for index, layer in enumerate(config.layers):
        wide_here, narrow_here = under(weights, f"{index}."), under(narrow, f"{index}.")
        x_BTM = x_BTM + _attention(_norm(x_BTM, wide_here["attention_norm.gain_M"], compute), narrow_here, layer)
        input_BTM = _norm(x_BTM, wide_here["mlp_norm.gain_M"], torch.float32)
        if isinstance(layer.mlp, MlpConfig):
            x_BTM = x_BTM + _gated(input_BTM.to(compute), narrow_here, "mlp")
        else:
            out_TM, here = _mixture(input_BTM.flatten(0, 1), wide_here, narrow_here, layer.mlp, compute)
            x_BTM, balance = x_BTM + out_TM.view_as(x_BTM), balance + here
    last_BTM = _norm(x_BTM, weights["head.norm.gain_M"], compute)
    return F.linear(last_BTM, narrow["embedding.token_VW"] * config.logit_scale).float(), balance


def under(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def _norm(x_BTM: Tensor, gain_M: Tensor, compute: torch.dtype) -> Tensor:
    return F.rms_norm(x_BTM.float(), gain_M.shape, gain_M, 1e-5).to(compute)


def _attention(x_BTM: Tensor, weights: Weights, layer: LayerConfig) -> Tensor:
    batch, tokens = x_BTM.shape[:2]
    heads, size = layer.attention.heads, layer.attention.head_size
    stacked_NM = torch.cat([weights[f"attention.{name}.weight_NI"] for name in ("query", "key", "value")])
    query, key_BTD, value_BTD = F.linear(x_BTM, stacked_NM).split([heads * size, size, size], -1)
    query_BHTD = _rotated(query.view(batch, tokens, heads, size).transpose(1, 2))
    score = torch.baddbmm(
        _mask(tokens).to(x_BTM.dtype).repeat(heads, 1).expand(batch, -1, -1),
        query_BHTD.reshape(batch, heads * tokens, size),  # one key/value head serves all: a taller matrix
        _rotated(key_BTD).transpose(1, 2),
        alpha=layer.attention.scale,
    )
    out_BHTD = torch.bmm(torch.softmax(score, -1), value_BTD).view(batch, heads, tokens, size)
    return F.linear(out_BHTD.transpose(1, 2).reshape(batch, tokens, -1), weights["attention.output.weight_NI"])


@cache
def _mask(tokens: int) -> Tensor:
    return torch.full((tokens, tokens), -torch.inf).triu(1)


@cache
def _rotation(tokens: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(tokens)[:, None] * rotary_frequency()
    return angle.cos().float(), angle.sin().float()


def rotary_frequency() -> Tensor:
    """Return the radians a token by which each pair of a head rotates, float64."""
    return ROTARY_BASE ** (-torch.arange(HEAD_SIZE // 2, dtype=torch.float64) / (HEAD_SIZE // 2))


def _rotated(x: Tensor) -> Tensor:
    cos, sin = (each.to(x.dtype) for each in _rotation(x.shape[-2]))
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _gated(x_TM: Tensor, weights: Weights, prefix: str) -> Tensor:
    gate_and_up = torch.cat([weights[f"{prefix}.gate.weight_NI"], weights[f"{prefix}.up.weight_NI"]])
    gate, up = F.linear(x_TM, gate_and_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, weights[f"{prefix}.down.weight_NI"])


def _mixture(
    x_TM: Tensor, wide: Weights, narrow: Weights, config: MoeConfig, compute: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Sort the choices by expert, so that each expert's product is one matrix product; nothing is dropped."""
    expert_TK, weight_TK, balance = routed(x_TM, wide, config)
    order = expert_TK.flatten().argsort(stable=True)
    token = order // config.router.top_k
    count_E = torch.bincount(expert_TK.flatten(), minlength=config.router.experts)
    served = []
    for expert, input_NM in enumerate(x_TM.to(compute).index_select(0, token).split(count_E.tolist())):
        own = {name.replace("ENI", "NI"): narrow[name][expert] for name in narrow if "experts" in name}
        served.append(_gated(input_NM, own, "mlp.experts"))
    weighted = torch.cat(served) * weight_TK.flatten()[order, None]
    out_TM = torch.zeros_like(x_TM).index_add(0, token, weighted)
    if config.residual:
        mix_T2 = torch.softmax(F.linear(x_TM, wide["mlp.coefficient.weight_NI"]), -1)
        out_TM = mix_T2[:, :1] * out_TM + mix_T2[:, 1:] * _gated(x_TM.to(compute), narrow, "mlp.residual")
    return out_TM, balance


def routed(x_TM: Tensor, wide: Weights, config: MoeConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return each token's experts, their weights, and the load-balancing loss, E * sum_e share[e] * mean score[e]."""
    score_TE = torch.softmax(F.linear(x_TM, wide["mlp.router.weight_NI"]), -1)
    weight_TK, expert_TK = score_TE.topk(config.router.top_k, -1)
    share_E = torch.bincount(expert_TK.flatten(), minlength=config.router.experts) / expert_TK.numel()
    balance = config.router.experts * (share_E * score_TE.mean(0)).sum()
    return expert_TK, config.router.scale * weight_TK / weight_TK.sum(-1, keepdim=True), balance


# ---- Training


class Muon:
    """Step by the momentum's nearest orthogonal matrix, for all matrices of one shape in one product."""

    def __init__(self, weights: list[Tensor]):
        self.groups: dict[tuple[int, ...], list[Tensor]] = {}
        for weight in weights:
            self.groups.setdefault(tuple(weight.shape[-2:]), []).append(weight)
        self.momenta = {shape: torch.zeros_like(self._stacked(group)) for shape, group in self.groups.items()}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for shape, group in self.groups.items():
            gradient, momentum = self._stacked([weight.grad for weight in group]), self.momenta[shape]
            momentum.lerp_(gradient, 0.05)
            step = max(1.0, shape[0] / shape[1]) ** 0.5 * _orthogonal(gradient.lerp(momentum, 0.95))
            pieces = step.split([math.prod(weight.shape[:-2]) for weight in group])
            for weight, piece in zip(group, pieces, strict=True):
                weight.mul_(1 - rate * DECAY).sub_(piece.reshape(weight.shape), alpha=rate)

    @staticmethod
    def _stacked(group: list[Tensor]) -> Tensor:
        return torch.cat([each.reshape(-1, *each.shape[-2:]) for each in group])


def _orthogonal(matrix: Tensor) -> Tensor:
    """Bring all singular values near 1, by five steps of a quintic Newton-Schulz iteration."""
    x = matrix.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.mT if tall else x).float()


def train(config: ModelConfig, text: Tensor, *, seed: int, steps: int, stop: int, folder: Path | None) -> list[float]:
    """Train for `stop` steps in cycles of `steps`; returns their losses, bits a byte. The folder gets checkpoints."""
    weights = {name: weight.requires_grad_() for name, weight in drawn(config, seed).items()}
    by_muon = [name for name, weight in weights.items() if weight.dim() > 1 and not _is_small(name)]
    muon = Muon([weights[name] for name in by_muon])
    others = [weight for name, weight in weights.items() if name not in by_muon]
    adam = torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    order = torch.Generator().manual_seed(1000 + seed)
    losses: list[float] = []
    checkpoint = None if folder is None else folder / "checkpoint.pt"
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint)
        for name, weight in weights.items():
            weight.data.copy_(saved["weights"][name])
        muon.momenta, losses = saved["momenta"], saved["losses"]
        adam.load_state_dict(saved["adam"])
        order.set_state(saved["order"])
    start = time.perf_counter()
    for step in range(len(losses), stop):
        place = step % steps
        length = SHORT if place < LONG_FROM * steps else CONTEXT
        at_S = torch.randint(0, len(text) - length - 1, (BATCH // length,), generator=order)
        byte_ST = torch.stack([text[at : at + length + 1] for at in at_S.tolist()])
        logit_STV, balance = logits(byte_ST[:, :-1], weights, config, torch.bfloat16)
        loss = F.cross_entropy(logit_STV.flatten(0, 1), byte_ST[:, 1:].flatten())
        (loss + BALANCE * balance).backward()
        pace = min(1.0, (place + 1) / 50) * max(0.02, min(1.0, (1 - place / steps) / 0.7))
        for group in adam.param_groups:
            group["lr"] = OTHER_RATE * pace
        adam.step()
        muon.step(MATRIX_RATE * pace)
        for weight in weights.values():
            weight.grad = None
        losses.append(loss.item() / math.log(2))
        if checkpoint is not None and ((step + 1) % 100 == 0 or step + 1 == stop):
            state = {"weights": {name: weight.detach() for name, weight in weights.items()}, "losses": losses}
            state |= {"momenta": muon.momenta, "adam": adam.state_dict(), "order": order.get_state()}
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
            recent = sum(losses[-100:]) / len(losses[-100:])
            print(f"step {step + 1}: {recent:.4f} bits a byte, {time.perf_counter() - start:.0f} s", flush=True)
    return losses


def _is_small(name: str) -> bool:
    """Whether a matrix is trained by AdamW: the token table, and what decides between experts."""
    return any(part in name for part in ("token_VW", "router", "coefficient"))


@torch.no_grad()
def bits_per_byte(weights: Weights, config: ModelConfig, text: Tensor) -> float:
    """Return the mean over all bytes but the first, in float32; each window of `CONTEXT` bytes starts anew."""
    nats, count = 0.0, 0
    for at in range(0, len(text) - 1, CONTEXT):
        window_T = text[at : at + CONTEXT + 1]
        logit_TV = logits(window_T[None, :-1], weights, config, torch.float32)[0][0]
        nats += F.cross_entropy(logit_TV, window_T[1:], reduction="sum").item()
        count += len(window_T) - 1
    return nats / count / math.log(2)


def train_and_judge(folder: Path, *, seed: int, dense: bool) -> None:
    """Train in the folder, and note there how well the trained weights do on the held-out books."""
    folder.mkdir(parents=True, exist_ok=True)
    text, held_out = parts(books())
    config = dense_config() if dense else mixture_config()
    losses = train(config, text, seed=seed, steps=STEPS, stop=CYCLES * STEPS, folder=folder)
    weights: Weights = torch.load(folder / "checkpoint.pt")["weights"]
    result = {
        "dense": dense,
        "seed": seed,
        "bits_per_byte": bits_per_byte(weights, config, held_out),
        "bits_per_byte_bfloat16": bits_per_byte(stored(weights), config, held_out),
        "parameters": sum(weight.numel() for weight in weights.values()),
        "losses": losses,
    }
    (folder / "result.json").write_text(json.dumps(result))


def stored(weights: Weights) -> Weights:
    """Return the weights as bfloat16 storage keeps them."""
    return {name: weight.bfloat16().float() if is_matrix(name) else weight for name, weight in weights.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train tiny-moe, or the dense model that it is measured against.")
    parser.add_argument("folder", type=Path, help="where checkpoint.pt and result.json go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dense", action="store_true", help="the dense model of the same active size")
    args = parser.parse_args()
    torch.set_num_threads(1)
    train_and_judge(args.folder, seed=args.seed, dense=args.dense)


if __name__ == "__main__":
    main()
