"""Every source hands out whole experts and slices of some: a rank's own elements, and no more bytes of a file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from twinfer.checkpoint import from_transformers, open_model
from twinfer.checkpoint.source import FileSource
from twinfer.checkpoint.upcycle import Upcycled
from twinfer.converting import convert
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import RandomSource
from twinfer.spec.config import INT4_GROUP, Activation, MlpConfig, ModelConfig, Storage
from twinfer.spec.errors import RequestError
from twinfer.spec.moe import MoeConfig, router
from twinfer.spec.shapes import is_buffer
from twinfer.spec.shard import ExpertShard, Shard
from twinfer.spec.weights import LayerWeights, tensors

from ..shards import assert_experts_join, shareable
from .test_convert import checkpoint_of, quiet
from .test_shards import Counted

SIZES: dict[str, Any] = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
LOCAL = SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 1, "intermediate_size": 6}


def apart() -> hf.PreTrainedModel:
    """A tensor an expert."""
    return hf.MixtralForCausalLM(hf.MixtralConfig(**LOCAL))


def stacked() -> hf.PreTrainedModel:
    """All experts in one tensor, transposed, gate and up row by row in turns, with biases."""
    return hf.GptOssForCausalLM(hf.GptOssConfig(**LOCAL, head_dim=4))


def flat() -> hf.PreTrainedModel:
    """All experts' rows in one matrix; down is transposed."""
    inner = {"ffn_hidden_size": 6, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 8}
    sizes = {"d_model": 8, "n_heads": 2, "n_layers": 2, "max_seq_len": 64, "vocab_size": 11}
    return hf.DbrxForCausalLM(
        hf.DbrxConfig(**sizes, attn_config={"kv_n_heads": 1, "rope_theta": 10000.0}, ffn_config=inner)
    )


@pytest.mark.parametrize("module", [apart, stacked, flat], ids=["apart", "stacked", "flat"])
def test_files_are_read_no_further(module: Any, tmp_path: Path) -> None:
    """As many bytes are read as the share has, whatever form a file keeps experts in; a live module is shared too."""
    torch.manual_seed(0)
    model = module()
    model.save_pretrained(tmp_path)
    source = open_model(str(tmp_path)).source
    assert isinstance(source, FileSource)
    store = source._store = Counted(source._store)

    def reads_its_bytes(share: LayerWeights) -> None:
        held = sum(tensor.nbytes for name, tensor in tensors(share) if not is_buffer(name))
        assert store.bytes == held
        store.bytes = 0

    whole = source.layer

    def counted_from_zero(index: int, shard: Shard | None = None) -> LayerWeights:
        store.bytes = 0
        return whole(index, shard)

    source.layer = counted_from_zero  # type: ignore[method-assign]
    tried = [(1, 3), (1, 2), (1, 1), (2, 3), (2, 2), (2, 1), (4, 3), (4, 2), (4, 1)]
    assert assert_experts_join(source, after_read=reads_its_bytes) == tried
    assert assert_experts_join(from_transformers(model)) == tried


def grouped() -> ModelConfig:
    """A dense layer and a mixture, whose columns two ranks, or two slices of experts, can cut at the ends of groups."""
    config = shareable(RandomPicker(3))
    one = config.layers[0]
    attention = replace(one.attention, heads=4, kv_heads=2, head_size=INT4_GROUP // 2)
    mlp = MlpConfig(width=2 * INT4_GROUP, activation=Activation.GELU_TANH, gated=True, bias=True)
    moe = MoeConfig(router=router("mixtral", experts=6, top_k=2), expert=mlp, shared=replace(mlp, width=4 * INT4_GROUP))
    layers = tuple(replace(one, attention=attention, mlp=each) for each in (mlp, moe))
    return replace(config, layers=layers, vocabulary=9)


@pytest.mark.parametrize("storage", Storage)
def test_folders_share_stored_experts(storage: Storage, tmp_path: Path) -> None:
    """What twinfer wrote is shared bit by bit, quantized values with the scales of their whole rows and groups."""
    convert(checkpoint_of(RandomSource(grouped(), 1)), tmp_path / "out", storage, quiet)
    tried = assert_experts_join(open_model(str(tmp_path / "out")).source, storage)
    assert {(3, 2), (2, 1)} <= set(tried)
    assert ((1, 4) in tried) == (storage is not Storage.INT4)


def test_int4_slices_of_experts_end_between_groups(tmp_path: Path) -> None:
    convert(checkpoint_of(RandomSource(grouped(), 1)), tmp_path / "out", Storage.INT4, quiet)
    source = open_model(str(tmp_path / "out")).source
    shard = Shard(rank=0, ranks=1, experts=ExpertShard(rank=0, ranks=1, slices=4))
    for read in (source.embedding, source.head, lambda each: source.layer(1, each)):
        with pytest.raises(RequestError, match=r"expert_slices is 4, but layer 1 .* multiples of 64 only; .* is 2"):
            read(shard)


def test_drawn_and_upcycled_weights_are_shared() -> None:
    assert (3, 2) in assert_experts_join(RandomSource(grouped(), 2))
    dense = replace(grouped(), layers=grouped().layers[:1])
    assert (2, 4) in assert_experts_join(Upcycled(RandomSource(dense), router("mixtral", experts=4, top_k=2)))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"rank": 2, "ranks": 2}, r"ExpertShard\.rank is 2; of 2 ranks it must be 0 to 1"),
        ({"rank": 0, "ranks": 0}, r"ExpertShard\.ranks is 0; it must be at least 1"),
        ({"rank": 0, "ranks": 1, "slice_rank": -1, "slices": 3}, r"slice_rank is -1; of 3 slices it must be 0 to 2"),
        ({"rank": 0, "ranks": 1, "slices": 0}, r"ExpertShard\.slices is 0; it must be at least 1"),
    ],
)
def test_places_that_do_not_exist_are_refused(place: dict[str, int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ExpertShard(**place)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"ranks": 4}, "expert is 4, but layer 1 has 6 experts, which do not divide by it; .* is 3"),
        ({"ranks": 2, "slices": 3}, "expert_slices is 3, but layer 1 has experts of width 128, .* is 2"),
    ],
)
def test_experts_that_cannot_be_shared_so_are_refused(place: dict[str, int], message: str) -> None:
    """With the nearest number that can."""
    with pytest.raises(RequestError, match=message):
        RandomSource(grouped()).layer(0, Shard(rank=0, ranks=2, experts=ExpertShard(rank=0, **place)))


def test_the_width_of_experts_need_not_divide_by_the_tensor_degree() -> None:
    """Where experts are placed: 3 ranks share 12 heads and an MLP of 24 and hold experts of width 10 in 2 slices."""
    config = shareable(RandomPicker(1))
    one, mlp = config.layers[0], MlpConfig(width=24, activation=Activation.RELU, gated=False, bias=True)
    moe = MoeConfig(router=router("switch", experts=3, top_k=1), expert=replace(mlp, width=10), shared=mlp)
    attention = replace(one.attention, heads=12, kv_heads=3)
    source = RandomSource(replace(config, layers=(replace(one, attention=attention, mlp=moe),), vocabulary=30))
    with pytest.raises(RequestError, match="experts of width 10, which does not divide by it"):
        source.layer(0, Shard(rank=0, ranks=3))
    place = ExpertShard(rank=2, ranks=3, slice_rank=1, slices=2)
    held: dict[str, Tensor] = dict(tensors(source.layer(0, Shard(rank=1, ranks=3, experts=place))))
    assert held["mlp.experts.up.weight_ENI"].shape == (1, 5, config.hidden)
    assert held["mlp.shared.up.weight_NI"].shape == (8, config.hidden)
