"""Settings of torch that reach every call, pinned: what a path computes does not depend on where it is called from.

A caller may run under autocast, in inference mode, or with another default dtype or device, for the sake of a model of
their own. torch then rounds, allocates and records otherwise in whatever is called, which may be a specification. A
path therefore runs each of its calls within `pinned`.
"""

import contextlib
import os
import threading

import torch

CPU = torch.device("cpu")


class pinned:
    """Run with float32 and the CPU as defaults, without autocast, autograd and inference mode; then as before.

    `device` is where the call computes; autocast matters there and on the CPU. With `threads`, that many are used.
    What is so already is not set again, and autograd alone not through a stack: that takes a while at every step.

    >>> torch.set_default_dtype(torch.float64)
    >>> with pinned(CPU):
    ...     print(torch.ones(1).dtype, torch.is_grad_enabled())
    torch.float32 False
    >>> torch.get_default_dtype(), torch.is_grad_enabled()
    (torch.float64, True)
    >>> torch.set_default_dtype(torch.float32)
    """

    def __init__(self, device: torch.device, threads: int | None = None) -> None:
        self._device = device
        self._threads = threads
        self._before: contextlib.ExitStack | None = None
        self._grad = False
        """Whether autograd alone is to be put back."""

    def __enter__(self) -> None:
        _float32.enter()
        try:
            threads, default = torch.get_num_threads(), torch.empty(0).device
            autocast = {
                kind
                for kind in ("cpu", self._device.type)
                if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
            }
            other_threads = self._threads is not None and threads != self._threads
            if not (autocast or other_threads or default != CPU or torch.is_inference_mode_enabled()):
                self._grad = torch.is_grad_enabled()
                if self._grad:
                    torch.set_grad_enabled(False)
                return
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
                for kind in autocast:
                    stack.enter_context(torch.autocast(kind, enabled=False))
                if default != CPU:
                    stack.enter_context(CPU)
                if self._threads is not None and other_threads:
                    stack.callback(torch.set_num_threads, threads)
                    torch.set_num_threads(self._threads)
                self._before = stack.pop_all()
        except BaseException:
            _float32.exit()
            raise

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            self._before.close()
        if self._grad:
            torch.set_grad_enabled(True)
        _float32.exit()


class _DefaultDtype:
    """Float32 as the default dtype, which is one for all threads: put back when the last call that needs it ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls = 0
        self._before = torch.float32

    def enter(self) -> None:
        with self._lock:
            if self._calls == 0:
                self._before = torch.get_default_dtype()
                if self._before is not torch.float32:
                    torch.set_default_dtype(torch.float32)
            self._calls += 1

    def renew_lock(self) -> None:
        """In a forked child, where a thread that held the lock is no more."""
        self._lock = threading.Lock()

    def exit(self) -> None:
        with self._lock:
            self._calls -= 1
            if self._calls == 0 and self._before is not torch.float32:
                torch.set_default_dtype(self._before)


_float32 = _DefaultDtype()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_float32.renew_lock)
