"""Demo data: every file has a manifest row, every row a file and a license with its text."""

from __future__ import annotations

import csv
from pathlib import Path

from pipeline_steps.pair.release.license_terms import terms


def rows(demo: Path) -> list[dict[str, str]]:
    with (demo / "manifest.csv").open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_every_license_has_its_text(demo: Path) -> None:
    used = {row["licence"] for row in rows(demo)}
    texts = {path.stem: path.read_text(encoding="utf-8") for path in (demo / "LICENSES").glob("*.txt")}
    assert set(texts) == used
    for name, text in texts.items():
        assert len(text) > (500 if name.startswith("LicenseRef-") else 1000), name
    for name in used:
        if name.startswith("CC-BY-"):
            title = "Attribution-ShareAlike" if "-SA-" in name else "Attribution"
            assert f"{title} {name.split('-')[-1]}" in texts[name][:200], name
        if name.startswith("GPL-"):
            assert f"Version {name[4]}," in texts[name][:200], name
    assert "Licence Art Libre 1.3" in texts["LAL-1.3"]
    assert "CC0 1.0 Universal" in texts["CC0-1.0"]


def test_files_and_rows_are_the_same_set(demo: Path) -> None:
    listed = [row["file"] for row in rows(demo)]
    found = [path.relative_to(demo).as_posix() for folder in ("images", "sounds") for path in (demo / folder).iterdir()]
    assert len(set(listed)) == len(listed)
    assert sorted(found) == sorted(listed)


def test_every_work_is_publishable_and_has_an_author(demo: Path) -> None:
    for row in rows(demo):
        assert terms(row["licence"]).publishable, row["file"]
        assert row["author"], row["file"]
        assert row["package"], row["file"]
        assert row["package_version"], row["file"]


def test_readme_excludes_the_data_from_the_program_license(demo: Path) -> None:
    text = (demo / "README.md").read_text(encoding="utf-8")
    assert "Apache-2.0" in text
    assert "does not cover" in text
    for name in {row["licence"] for row in rows(demo)}:
        version = name.rsplit("-", 1)[-1]
        assert name in text or f"`-{version}`" in text, f"README does not mention {name}"
