"""Write the metadata table of a folder `<class>/<recording>_<take>.wav`: python toy_manifest.py FOLDER LICENSE"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

COLUMNS = ("file", "license", "group", "label")


def write_manifest(folder: Path, license: str) -> Path:
    """Write `manifest.csv` with one row per WAV file; takes of a recording have the same group."""
    target = folder / "manifest.csv"
    with target.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, COLUMNS)
        writer.writeheader()
        for path in sorted(folder.rglob("*.wav")):
            recording = path.stem.rsplit("_", 1)[0]
            writer.writerow({
                "file": path.relative_to(folder).as_posix(),
                "license": license,
                "group": f"{path.parent.name}/{recording}",
                "label": path.parent.name,
            })  # fmt: skip
    return target


if __name__ == "__main__":
    print(write_manifest(Path(sys.argv[1]), sys.argv[2]))
