"""What this machine is called, and how much memory the operating system says a process takes."""

import contextlib
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from .rows import Machine

_STATUS = Path("/proc/self/status")


def this_machine(device: torch.device | str = "cpu") -> Machine:
    """The machine as rows name it."""
    on_gpu = torch.device(device).type == "cuda"
    return Machine(
        processor=processor_name(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name(device) if on_gpu else None,
        python=platform.python_version(),
        torch=torch.__version__,
        twinfer=version("twinfer"),
    )


def processor_name() -> str:
    """The CPU's own name, with family, model and stepping where the system tells: names alone can be vague.

    "AMD EPYC (family 25 model 1 stepping 1)".
    """
    try:
        pairs = (line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        told = {key.strip(): value.strip() for key, value in pairs}  # all cores alike; the last one stays
    except OSError:
        return platform.processor() or platform.machine()
    if "model name" not in told:
        return platform.processor() or platform.machine()
    numbers = " ".join(
        f"{word} {told[key]}"
        for word, key in (("family", "cpu family"), ("model", "model"), ("stepping", "stepping"))
        if key in told
    )
    return f"{told['model name']} ({numbers})" if numbers else told["model name"]


def last_level_cache_bytes() -> int | None:
    """Size of the largest cache of the first core; None where the system does not say."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            text = file.read_text().strip()
            sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]])
    return max(sizes, default=None)


def resident_bytes() -> int | None:
    """What this process has in memory now; None where the system does not say."""
    return _status("VmRSS:")


def peak_resident_bytes() -> int | None:
    """The most that this process had in memory since it started, or since `forget_peak`."""
    return _status("VmHWM:")


def forget_peak() -> bool:
    """Let the peak start anew from what is resident now; whether the system allows that (Linux does)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)
