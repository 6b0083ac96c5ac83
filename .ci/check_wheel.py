"""check_wheel.py WHEEL ROOM...: the wheel holds every module of the rooms, its own metadata, and nothing else."""

import sys
import zipfile
from pathlib import Path


def main(wheel: str, *rooms: str) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    packages = {room: "twinfer" if room == "face" else f"twinfer/{room}" for room in rooms}
    wanted = {
        f"{packages[room]}/{path.relative_to(room).as_posix()}" for room in rooms for path in Path(room).rglob("*.py")
    }
    wanted.add("twinfer/py.typed")
    if names != wanted:
        sys.exit(f"surplus in the wheel: {sorted(names - wanted)}; missing: {sorted(wanted - names)}")
    print(f"{Path(wheel).name}: {len(names)} files, all under twinfer/")


if __name__ == "__main__":
    main(*sys.argv[1:])
