"""The safetensors files of a Hugging Face folder, memory-mapped: one `model.safetensors`, or shards under an index."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..spec.errors import CheckpointError
from .fields import Fields

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

FLOATS = ("F64", "F32", "F16", "BF16")

PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt")

EXPERT_PICKLES = "layer_*_expert_*_mp_rank_*_model_states.pt"
"""What DeepSpeed calls the files of single experts."""


class SafetensorsFolder:
    """A `TensorStore` over a folder. Raises `CheckpointError` for files that are missing, damaged or unsafe."""

    def __init__(self, folder: Path):
        self.where = str(folder)
        self._file_of: dict[str, Any] = {}
        self._dtypes: dict[str, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        self._paths = _files(folder)
        for path, expected in self._paths.items():
            file = _opened(path)
            names = set(file.keys())
            if absent := sorted(expected - names):
                raise CheckpointError(
                    f"{path} does not hold {absent[0]}, though {INDEX} says so; fetch the folder again"
                )
            for name in file.keys():  # noqa: SIM118 (an open file is no dict)
                if name in shapes:
                    raise CheckpointError(
                        f"{path} holds {name}, and so does another file of {folder}; keep one of them"
                    )
                entry = file.get_slice(name)
                shapes[name] = tuple(entry.get_shape())
                self._dtypes[name] = str(entry.get_dtype())
                self._file_of[name] = file
        self.shapes: Mapping[str, tuple[int, ...]] = shapes

    def tensor_table(self) -> bytes:
        return b"".join(header_of(path) for path in self._paths)

    def unreadable(self, name: str) -> str | None:
        dtype = self._dtypes[name]
        return None if dtype in FLOATS else f"kept as {dtype}; only {', '.join(FLOATS)} can be read"

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor

    def read_slice(self, name: str, cuts: tuple[slice, ...]) -> Tensor:
        tensor: Tensor = self._file_of[name].get_slice(name)[cuts]
        return tensor


def header_of(path: Path) -> bytes:
    """Return a safetensors file's header, which says what tensors it holds: a length of eight bytes, then JSON."""
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def _files(folder: Path) -> dict[Path, set[str]]:
    """The folder's weight files, each with the tensors that the index says it holds."""
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: set()}
    if (folder / INDEX).is_file():
        return _shards(folder)
    if found := sorted(folder.glob(EXPERT_PICKLES)):
        raise CheckpointError(
            f"{folder} holds {found[0].name} and {len(found) - 1} more pickles of single experts, as DeepSpeed saves "
            "them; pickles can run any code when read and are refused; where you trust them, load each with "
            "torch.load(path, weights_only=True), join their tensors with those of the rest of the model under the "
            f"names that they have, and write them with safetensors.torch.save_file to {SINGLE}"
        )
    for pattern in PICKLES:
        if found := sorted(folder.glob(pattern)):
            raise CheckpointError(
                f"{folder} holds only {found[0].name}, a pickle, which can run any code when read and is refused; "
                'where you trust it, convert it: python -c "import transformers; transformers.AutoModelForCausalLM.'
                f"from_pretrained({str(folder)!r}).save_pretrained('converted')\""
            )
    raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}; it must hold the model's weights")


def _shards(folder: Path) -> dict[Path, set[str]]:
    index = Fields.of_json((folder / INDEX).read_bytes(), str(folder / INDEX))
    files: dict[Path, set[str]] = {}
    weight_map = index.section("weight_map")
    if weight_map is None:
        raise CheckpointError(f"{index.where}weight_map is missing; fetch the folder again")
    for name in weight_map.names():
        files.setdefault(_inside(folder, weight_map.text(name)), set()).add(name)
    return files


def _inside(folder: Path, name: str) -> Path:
    """The file that an index names, by a plain name: in the index's own folder, or where a link of it leads.

    The index comes with the model, the links are the user's own: the hub's cache, for one, is made of them.
    """
    if not name.isprintable() or name in ("", ".", "..") or any(sign in name for sign in "/\\:"):
        raise CheckpointError(f"{folder / INDEX} names {name!r}; it must name files beside itself, without a folder")
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{folder / INDEX} names {name}, which is not there; fetch the missing file")
    return path


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or corrupt: {error}; fetch the file again") from None
