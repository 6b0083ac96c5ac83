"""Compiled programs kept beside Inductor's own cache, so that a later process starts without tracing them again.

Why it is faster: with Inductor's cache warm, torch still traces and lowers a whole model for each program before it
finds the kernels; that takes most of a warm start's time and more memory than some models' weights. A kept program
needs neither.

What it relies on: a program is found again only by a key made of everything it was compiled from, so that nothing ever
has to be thrown away: the source of this package and of `spec`, torch's version and settings, the machine's vector
instructions, and shape, stride, dtype, device, identity and marked sizes of every argument. Like the rest of Inductor's
cache the files are pickles, so a file is read only if the user who runs this owns it: Inductor's folder lies by default
in the system's temporary folder, where others can write.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import pickle
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.utils import _pytree as pytree

KERNELS: dict[str, Any] = {
    "cpp.enable_floating_point_contract_flag": "fast",
    "realize_opcount_threshold": 2000,
    "realize_reads_threshold": 400,
    "realize_acc_reads_threshold": 400,
    "cpp.min_chunk_size": 2048,
}
"""Inductor's options that make kernels what they are, so a kept program must be loaded under them too: a product and a
sum are one operation, which rounds once; the terms of a product of some rows are never written out to memory; and a
loop shorter than threads take to wait for each other is one thread's."""

_SOURCES = (Path(__file__).parent, Path(__file__).parent.parent / "spec")


def load_or_compile(
    program: Callable[..., Any], arguments: tuple[Any, ...], described: str, on_compile: Callable[[str], None]
) -> Callable[..., Any]:
    """The compiled form of a program from `programs.graph`, for arguments that differ from these in marked sizes only.

    `described` says what the arguments do not (config, storage, which program). `on_compile` is called with a few
    words that say why the program has to be compiled, if it has to.
    """
    if inductor.force_disable_caches:
        on_compile("caches are disabled")
        program(*arguments)
        return program
    file = folder() / f"{_key(arguments, described)}.pt2"
    reason = "once; later starts find it in the cache"
    try:
        return _load(_own(file), file.stem)
    except FileNotFoundError:
        pass
    except OSError as error:
        reason = f"{file} cannot be read: {error.strerror}"
    except Exception as error:  # whatever a damaged pickle raises
        reason = f"{file} is damaged: {type(error).__name__}"
    on_compile(reason)
    compiled = _compile(program, arguments)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not answers
        _keep(compiled, file)
    return compiled


def folder() -> Path:
    """Where programs are kept: a folder of Inductor's cache, which TORCHINDUCTOR_CACHE_DIR can move."""
    return Path(cache_dir()) / "twinfer"


def _compile(program: Any, arguments: tuple[Any, ...]) -> Callable[..., Any]:
    with torch._dynamo.config.patch(enable_aot_compile=True):
        compiled: Any = program.aot_compile((arguments, {}))
    compiled.disable_guard_check()  # as `programs` explains
    function: Callable[..., Any] = compiled
    return function


def _own(file: Path) -> bytes:
    """The file's bytes. Raises `PermissionError` if another user put it there."""
    with file.open("rb") as opened:
        if hasattr(os, "getuid") and os.fstat(opened.fileno()).st_uid != os.getuid():
            raise PermissionError(errno.EPERM, "it belongs to another user")
        return opened.read()


def _load(kept: bytes, key: str) -> Callable[..., Any]:
    digest, body = kept[:32], kept[32:]
    if _digest(key, body) != digest:
        raise pickle.UnpicklingError("its digest is that of another program or of other bytes")
    from torch._dynamo.aot_compile import AOTCompiledFunction

    with inductor.patch(KERNELS):
        compiled = AOTCompiledFunction.deserialize(body)
    compiled.disable_guard_check()
    return compiled


def _keep(compiled: Any, file: Path) -> None:
    """Write whole or not at all, the digest first."""
    body: bytes = type(compiled).serialize(compiled).serialized_data
    file.parent.mkdir(parents=True, exist_ok=True)
    number, unfinished = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(number, "wb") as out:
            out.write(_digest(file.stem, body) + body)
            out.flush()
            os.fsync(out.fileno())
        os.replace(unfinished, file)
    except BaseException:
        os.unlink(unfinished)
        raise


def _digest(key: str, body: bytes) -> bytes:
    """Of a program and of the key that it is found by: a file under another's name counts as damaged."""
    return hashlib.sha256(key.encode() + body).digest()


def _key(arguments: tuple[Any, ...], described: str) -> str:
    leaves, form = pytree.tree_flatten(arguments)
    first: dict[int, int] = {}
    facts = [_facts(leaf, first.setdefault(id(leaf), index)) for index, leaf in enumerate(leaves)]
    whole = json.dumps([_machine(), _settings(), described, str(form), facts], sort_keys=True, default=_plain)
    return hashlib.sha256(whole.encode()).hexdigest()


def _facts(leaf: Any, first: int) -> list[Any]:
    """What a compiled program may depend on; `first` is the place of the same object's first appearance."""
    if not isinstance(leaf, Tensor):
        return [repr(leaf), first]
    marked = sorted(getattr(leaf, "_dynamo_dynamic_indices", ()))
    shape = ["any" if axis in marked else size for axis, size in enumerate(leaf.shape)]
    return [shape, leaf.stride(), leaf.dtype, leaf.device, marked, first]


def _plain(value: Any) -> Any:
    """In place of what JSON has no form for; the order of a set differs from process to process."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


@functools.cache
def _machine() -> list[str]:
    source = hashlib.sha256()
    for file in sorted(file for package in _SOURCES for file in package.glob("*.py")):
        source.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    versions = torch.__version__, torch.version.git_version or "", platform.python_version(), platform.machine()
    return [source.hexdigest(), *versions, str(pick_vec_isa()), accelerator]


def _settings() -> list[Any]:
    """torch's settings that are not at their defaults, and the thread count, which kernels contain."""
    dynamo: Any = torch._dynamo.config
    changed: Any = inductor
    return [torch.get_num_threads(), changed.save_config_portable(), dynamo.save_config_portable()]
