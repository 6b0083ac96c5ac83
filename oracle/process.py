"""The state of the process that a candidate must leave as it found it.

Some of it changes what every later product returns (subnormals read as zero, the default dtype, TF32), some of it how
long that takes (threads). A candidate that changes it would be judged against a reference that runs otherwise.
"""

import zlib
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class ProcessState:
    subnormals_become_zero: bool
    default_dtype: torch.dtype
    threads: int
    grad_mode: bool
    deterministic_algorithms: bool
    float32_matmul_precision: str
    mkldnn: bool
    autocast: bool
    default_device: torch.device
    random_numbers: int
    """A checksum of the state of torch's global generator, which a candidate may neither seed nor draw from."""
    generator_state: Tensor = field(compare=False, repr=False)

    @classmethod
    def now(cls) -> "ProcessState":
        """Read the state; torch tells of subnormals only by its arithmetic."""
        smallest = torch.finfo(torch.float64).smallest_normal
        halved = torch.tensor(smallest, dtype=torch.float64, device="cpu") / 2
        generator_state = torch.get_rng_state()
        return cls(
            subnormals_become_zero=float(halved) == 0,
            default_dtype=torch.get_default_dtype(),
            threads=torch.get_num_threads(),
            grad_mode=torch.is_grad_enabled(),
            deterministic_algorithms=torch.are_deterministic_algorithms_enabled(),
            float32_matmul_precision=torch.get_float32_matmul_precision(),
            mkldnn=torch._C._get_mkldnn_enabled(),
            autocast=torch.is_autocast_enabled("cpu"),
            default_device=torch.get_default_device(),
            random_numbers=zlib.crc32(generator_state.numpy().tobytes()),
            generator_state=generator_state,
        )

    def restore(self) -> None:
        """Set the process back to this state, where it has left it."""
        now = ProcessState.now()
        if now.subnormals_become_zero != self.subnormals_become_zero:
            torch.set_flush_denormal(self.subnormals_become_zero)
        if now.default_dtype is not self.default_dtype:
            torch.set_default_dtype(self.default_dtype)
        if now.threads != self.threads:
            torch.set_num_threads(self.threads)
        if now.grad_mode != self.grad_mode:
            torch.set_grad_enabled(self.grad_mode)
        if now.deterministic_algorithms != self.deterministic_algorithms:
            torch.use_deterministic_algorithms(self.deterministic_algorithms)
        if now.float32_matmul_precision != self.float32_matmul_precision:
            torch.set_float32_matmul_precision(self.float32_matmul_precision)
        if now.mkldnn != self.mkldnn:
            torch._C._set_mkldnn_enabled(self.mkldnn)
        if now.autocast != self.autocast:
            torch.set_autocast_enabled("cpu", self.autocast)
        if now.default_device != self.default_device:
            torch.set_default_device(None if self.default_device.type == "cpu" else self.default_device)
        if now.random_numbers != self.random_numbers:
            torch.set_rng_state(self.generator_state)

    def differences(self, later: "ProcessState") -> list[str]:
        """Name what is another in a later state, such as "threads was 1 and is 4"."""
        compared = (each.name for each in fields(self) if each.compare)
        pairs = ((name, getattr(self, name), getattr(later, name)) for name in compared)
        return [f"{name} was {before} and is {after}" for name, before, after in pairs if before != after]
