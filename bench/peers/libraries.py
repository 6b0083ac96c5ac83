"""Other libraries running the same model, ready to answer a prompt.

Shapes: T prompt tokens, B sequences, V vocabulary.
"""

import ctypes
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...spec.errors import MachineError


class TransformersCandidate:
    """A module of transformers in eager mode, its default cache and attention; logits of the last position only."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def answer(self, prompt_T: Tensor, new: int, batch: int = 1) -> Iterator[Sequence[int]]:
        given_BT, cache = prompt_T.expand(batch, -1), None
        for _ in range(new):
            with torch.no_grad():
                out = self._model(given_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
            given_BT, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            yield given_BT[:, 0].tolist()


class StaticCacheCandidate:
    """The same as transformers' documentation compiles it: a static cache, and the decode step as one graph.

    The cache holds `tokens` positions, all of which every step attends to. Prompts are read in eager mode.
    """

    def __init__(self, model: Any, tokens: int) -> None:
        library: Any = import_module("transformers")
        self._model = model
        self._cache = library.StaticCache(config=model.config, max_cache_len=tokens)
        self._step = torch.compile(self._read, mode="reduce-overhead", fullgraph=True)

    def _read(self, given_BT: Tensor) -> Tensor:
        out = self._model(given_BT, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        logits_BTV: Tensor = out.logits
        return logits_BTV[:, -1:].argmax(-1)

    def answer(self, prompt_T: Tensor, new: int, batch: int = 1) -> Iterator[Sequence[int]]:
        assert batch == 1, "the cache is made for one sequence"
        self._cache.reset()
        with torch.no_grad():
            token_B1 = self._read(prompt_T[None])
        yield token_B1[:, 0].tolist()
        for _ in range(new - 1):
            with torch.no_grad():
                token_B1 = self._step(token_B1).clone()  # reduce-overhead would write the next one over it
            yield token_B1[:, 0].tolist()


@cache
def llama_cpp() -> Any:
    """llama-cpp-python's module, its library started and silenced."""
    library: Any = import_module("llama_cpp")
    _kept.append(library.llama_log_callback(lambda level, text, data: None))
    library.llama_log_set(_kept[-1], None)
    library.llama_backend_init()
    return library


_kept: list[Any] = []
"""Callbacks of the library, which must not be collected before it."""


class LlamaCppCandidate:
    """llama.cpp on a GGUF file, through the C interface of llama-cpp-python, with llama.cpp's own defaults."""

    PIECE = 512
    """Tokens of a prompt that are read at once, as llama.cpp does by default."""

    def __init__(self, file: Path, tokens: int, threads: int) -> None:
        self._library = library = llama_cpp()
        self._model = library.llama_model_load_from_file(str(file).encode(), library.llama_model_default_params())
        if not self._model:
            raise MachineError(f"llama.cpp cannot load {file.name}")
        settings = library.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = tokens, self.PIECE, self.PIECE
        settings.n_threads = settings.n_threads_batch = threads
        self._context = library.llama_init_from_model(self._model, settings)
        if not self._context:
            raise MachineError(f"llama.cpp cannot make a context of {tokens} tokens for {file.name}")
        self._vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))

    def answer(self, prompt_T: Tensor, new: int, batch: int = 1) -> Iterator[Sequence[int]]:
        assert batch == 1, "it is timed with one sequence"
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        given = prompt_T.tolist()
        for _ in range(new):
            given = [self._read(given)]
            yield given

    def _read(self, tokens: list[int]) -> int:
        library = self._library
        for first in range(0, len(tokens), self.PIECE):
            piece = tokens[first : first + self.PIECE]
            ids = (library.llama_token * len(piece))(*piece)
            status = library.llama_decode(self._context, library.llama_batch_get_one(ids, len(piece)))
            if status != 0:
                raise MachineError(f"llama.cpp could not read {len(piece)} tokens (status {status})")
        logits = library.llama_get_logits_ith(self._context, -1)
        logits_V = np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self._vocabulary,))
        return int(logits_V.argmax())


class CTranslate2Candidate:
    """CTranslate2 on a folder of transformers, converted with one of its own quantizations."""

    def __init__(self, folder: Path, converted: Path, quantization: str, threads: int) -> None:
        library: Any = import_module("ctranslate2")
        converter: Any = import_module("ctranslate2.converters").TransformersConverter(str(folder))
        converter.convert(str(converted), quantization=quantization)
        threads_before = torch.get_num_threads()
        self._generator = library.Generator(
            str(converted), device="cpu", compute_type=quantization, intra_threads=threads
        )
        torch.set_num_threads(threads_before)  # it shares OpenMP with torch, and sets the caller's number too

    def answer(self, prompt_T: Tensor, new: int, batch: int = 1) -> Iterator[Sequence[int]]:
        assert batch == 1, "it streams one sequence"
        prompt = [f"<{token}>" for token in prompt_T.tolist()]
        for step in self._generator.generate_tokens(prompt, max_length=new, min_length=new, sampling_topk=1):
            yield [step.token_id]


class DeepSpeedCandidate(TransformersCandidate):
    """DeepSpeed's inference engine around a module of transformers; its own kernels are not for CPUs."""

    def __init__(self, model: Any) -> None:
        library: Any = import_module("deepspeed")
        super().__init__(library.init_inference(model, dtype=torch.float32, replace_with_kernel_inject=False))
