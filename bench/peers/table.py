"""Other implementations of the same model: which there are, what they need, and what became of each here."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from ..candidates import Candidate
from ..reasons import reason
from ..targets import EAGER, STATIC
from .exported import Exports, transformers_llama
from .libraries import (
    CTranslate2Candidate,
    DeepSpeedCandidate,
    LlamaCppCandidate,
    StaticCacheCandidate,
    TransformersCandidate,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """How much the peers must hold."""

    decode_tokens: int
    """Of a sequence that is decoded, its prompt included."""
    most_tokens: int
    """Of any sequence."""
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One implementation."""

    name: str
    package: str
    """What Python imports."""
    install: str
    precision: str
    make: Callable[[Exports, Capacity], Candidate]
    prefills: bool = True
    """Whether its prompts are worth timing: not where they are read as another peer reads them."""


def _llama_cpp(kind: str) -> Peer:
    return Peer(
        name=f"llama.cpp {kind}",
        package="llama_cpp",
        install="pip install llama-cpp-python",
        precision=kind,
        make=lambda exports, capacity: LlamaCppCandidate(exports.gguf(kind), capacity.most_tokens, capacity.threads),
    )


def _ctranslate2(quantization: str) -> Peer:
    return Peer(
        name=f"CTranslate2 {quantization}",
        package="ctranslate2",
        install="pip install ctranslate2",
        precision=quantization,
        make=lambda exports, capacity: CTranslate2Candidate(
            exports.transformers_folder, exports.folder / f"ctranslate2-{quantization}", quantization, capacity.threads
        ),
    )


PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            name=EAGER,
            package="transformers",
            install="pip install transformers",
            precision="float32",
            make=lambda exports, capacity: TransformersCandidate(exports.transformers),
        ),
        Peer(
            name=STATIC,
            package="transformers",
            install="pip install transformers",
            precision="float32",
            make=lambda exports, capacity: StaticCacheCandidate(exports.transformers, capacity.decode_tokens),
            prefills=False,
        ),
        *map(_llama_cpp, ("F32", "F16", "Q8_0", "Q4_1")),
        *map(_ctranslate2, ("float32", "int8")),
        Peer(
            name="DeepSpeed init_inference",
            package="deepspeed",
            install="pip install deepspeed",
            precision="float32",
            make=lambda exports, capacity: DeepSpeedCandidate(
                transformers_llama(exports.source)
            ),  # it changes the module
        ),
    )
}


def ready_peers(
    names: Collection[str], make: Callable[[str], Candidate], report: Callable[[str], None]
) -> tuple[dict[str, Candidate], dict[str, str]]:
    """The peers of these names that run here, each made by its name; and why each of the others does not, in a line."""
    candidates: dict[str, Candidate] = {}
    absent: dict[str, str] = {}
    for name in names:
        peer = PEERS[name]
        if find_spec(peer.package) is None:
            absent[name] = f"not installed ({peer.install})"
            continue
        report(f"preparing {name}")
        try:
            candidates[name] = make(name)
        except Exception as error:  # whatever another library raises is its own affair, and the rest is still measured
            absent[name] = reason(error)
    return candidates, absent
