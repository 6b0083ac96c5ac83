"""How much memory this process has taken, by the operating system's own accounting."""

import sys
from pathlib import Path


def peak_memory_bytes() -> int | None:
    """The most memory that was resident at once, of this process alone; None where the system does not say.

    Linux keeps it as VmHWM, which starts anew with each program; ru_maxrss would also count the program that launched
    this one.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
