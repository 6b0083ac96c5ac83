"""The digest by which ranks find that they have unlike model files: of the config and all of the tensor table."""

import json
import struct
from pathlib import Path

import torch
from gguf import GGMLQuantizationType as Kinds

from twinfer.checkpoint import open_model
from twinfer.converting import convert
from twinfer.ranks import digest
from twinfer.spec.config import Storage

from .tiny_files import write_folder, write_gguf


def of(model: str) -> str:
    return digest(open_model(model))


def places_swapped(path: Path, one: str, other: str) -> None:
    """Have the header say that two tensors of one shape lie in each other's place."""
    kept = path.read_bytes()
    (length,) = struct.unpack("<Q", kept[:8])
    header = json.loads(kept[8 : 8 + length])
    places = [header[name]["data_offsets"] for name in (one, other)]
    header[other]["data_offsets"], header[one]["data_offsets"] = places
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= length
    path.write_bytes(kept[:8] + text.ljust(length) + kept[8 + length :])


def test_of_a_folder(tmp_path: Path) -> None:
    """Equal for copies, whatever the values; another one for another dtype, config, or place of a tensor."""
    first = of(write_folder(tmp_path / "first"))
    assert of(write_folder(tmp_path / "copy")) == first
    assert of(write_folder(tmp_path / "values", seed=1)) == first
    places_swapped(
        tmp_path / "values" / "model.safetensors",
        *(f"model.layers.0.mlp.{each}_proj.weight" for each in ("gate", "up")),
    )
    others = [
        of(write_folder(tmp_path / "dtype", dtype=torch.bfloat16)),
        of(write_folder(tmp_path / "as wide", dtype=torch.float16)),
        of(write_folder(tmp_path / "config", rms_norm_eps=1e-6)),
        of(str(tmp_path / "values")),
    ]
    assert len({first, *others}) == 1 + len(others)


def test_of_gguf(tmp_path: Path) -> None:
    """Another one for another quantized format."""
    made = {kind: of(write_gguf(tmp_path / f"{kind.name}.gguf", kind)) for kind in (Kinds.F32, Kinds.Q8_0, Kinds.Q4_0)}
    assert of(write_gguf(tmp_path / "copy.gguf", Kinds.Q8_0, seed=1)) == made[Kinds.Q8_0]
    assert len(set(made.values())) == len(made)


def test_of_the_twinfer_form(tmp_path: Path) -> None:
    """Another one for each storage."""
    opened, found = open_model(write_folder(tmp_path / "model")), []
    for name, storage in [*((each.value, each) for each in Storage), ("again", Storage.INT8)]:
        convert(opened, tmp_path / name, storage, lambda line: None)
        found.append(of(str(tmp_path / name)))
    assert len(set(found)) == len(Storage)
    assert found[-1] == found[list(Storage).index(Storage.INT8)]
