"""check_wheel.py WHEEL PACKAGE...: the wheel holds every module of the packages but those of `CHECKOUT_ONLY`.

The models in `INCLUDED` are there too.

Besides its own metadata it holds nothing else.
"""

import sys
import zipfile
from pathlib import Path

CHECKOUT_ONLY = Path("bench/peers")
"""Packages that run from a checkout only."""
INCLUDED = Path("checkpoint/included")


def main(wheel: str, *packages: str) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    inside = {package: "twinfer" if package == "api" else f"twinfer/{package}" for package in packages}
    wanted = {
        f"{inside[package]}/{path.relative_to(package).as_posix()}"
        for package in packages
        for path in Path(package).rglob("*.py")
        if CHECKOUT_ONLY not in path.parents
    }
    wanted.add("twinfer/py.typed")
    wanted |= {f"twinfer/{path.as_posix()}" for path in INCLUDED.rglob("*") if path.is_file()}
    if names != wanted:
        sys.exit(f"surplus in the wheel: {sorted(names - wanted)}; missing: {sorted(wanted - names)}")
    print(f"{Path(wheel).name}: {len(names)} files, all under twinfer/")


if __name__ == "__main__":
    main(*sys.argv[1:])
