"""Tests of `sonify forget`: removed files, rows, cache parts and shards; rejection by ingest."""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline_steps.commands.deletion import drop_csv_rows, may_derive_from
from pipeline_steps.core.hashing import sha256_bytes
from pipeline_steps.core.media_shards import MediaShardReader
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.result_cache import ResultCache
from pipeline_steps.core.schemas import PAIRS
from pipeline_steps.core.tables import read_table
from pipeline_steps.ingest import takedowns
from tests.factories.cli_project import Sonify, commit, git, json_output

VALUE = pa.schema([pa.field("value", pa.int64())])
CELLS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\r\x00"), max_size=8)


@pytest.fixture
def caches(pool: ProjectPaths, ids: dict[str, str]) -> dict[str, ResultCache]:
    """Cached results of the first dog, of another image, and of mixtures."""
    stores = {stage: ResultCache(str(pool.result_cache), stage, "f", VALUE) for stage in ("caption", "train", "evaluate-sound")}
    stores["caption"].append({ids["i-dog-000"]: {"value": 1}, ids["i-cow-000"]: {"value": 2}})
    stores["train"].append({"0123456789abcdef": {"value": 3}})
    stores["evaluate-sound"].append({"0123456789abcdef": {"value": 4}, ids["s-cow-000"]: {"value": 5}})
    return stores


def test_item_is_removed_everywhere_and_other_items_stay(
    pool: ProjectPaths, sonify: Sonify, ids: dict[str, str], caches: dict[str, ResultCache]
) -> None:
    item, other = ids["i-dog-000"], ids["i-cow-000"]
    commit(pool, {}, "all")
    raw = pool.root / "data/demo"
    copy = raw / "under-another-name.webp"
    copy.write_bytes((raw / "i-dog-000.webp").read_bytes())
    samples = pool.reports / "samples"
    samples.mkdir(parents=True)
    (samples / f"picture-{item}.jpg").write_bytes(b"x")
    before = {i: MediaShardReader(pool.media).payload(i) for i in ids.values()}
    table = (raw / "manifest.csv").read_bytes()

    plan = json_output(sonify("forget", item[:10], "--dry-run", "--json"))
    assert plan["done"] is False
    assert copy.exists()
    assert len(plan["files"]) == 2
    assert any("git's history" in text for text in plan["beyond"])
    assert any("DVC's cache: 1 shard objects" in text for text in plan["beyond"])

    done = json_output(sonify("forget", item[:10], "--yes", "--reason", "asked", "--json"))
    assert done["done"] is True
    assert not copy.exists()
    assert not (raw / "i-dog-000.webp").exists()
    assert not (samples / f"picture-{item}.jpg").exists()
    lines = table.splitlines(keepends=True)
    assert (raw / "manifest.csv").read_bytes() == b"".join(line for line in lines if b"i-dog-000.webp" not in line)
    media = MediaShardReader(pool.media)
    assert item not in media
    assert {i: media.payload(i) for i in before if i != item} == {i: payload for i, payload in before.items() if i != item}
    assert caches["caption"].load([item, other]) == {other: {"value": 2}}
    assert caches["train"].load(["0123456789abcdef"]) == {}
    assert caches["evaluate-sound"].load(["0123456789abcdef", ids["s-cow-000"]]) == {ids["s-cow-000"]: {"value": 5}}
    assert takedowns.parse_takedowns((raw / "takedowns.csv").read_text()) == {item}
    again = json_output(sonify("forget", item, "--yes", "--json"))
    assert (again["files"], again["shard"]) == ([], None)
    assert (raw / "takedowns.csv").read_text().count(item) == 1


def test_worktrees_of_failed_runs_are_listed(pool: ProjectPaths, sonify: Sonify, ids: dict[str, str]) -> None:
    commit(pool, {}, "all")
    for name in ("failed-run", "without"):
        git(pool.root, "worktree", "add", "--detach", str(pool.runs / "worktrees" / name))
    (pool.runs / "worktrees/without/data/demo/i-dog-000.webp").unlink()
    done = json_output(sonify("forget", ids["i-dog-000"], "--yes", "--json"))
    (text,) = [text for text in done["beyond"] if "worktree" in text]
    assert text.startswith("worktrees of failed runs: .runs/worktrees/failed-run; git worktree remove")


def test_ingest_rejects_the_bytes_under_any_name(pool: ProjectPaths, sonify: Sonify, ids: dict[str, str]) -> None:
    from pipeline_steps.ingest.config import IngestConfig
    from pipeline_steps.ingest.stage import dry_run

    raw = pool.root / "data/demo"
    payload = (raw / "i-dog-000.webp").read_bytes()
    assert sonify("forget", "i-dog-000.webp", "--yes").exit_code == 0
    (raw / "new-name.webp").write_bytes(payload)
    found = dry_run(raw, IngestConfig(metadata=None, pool=None, holdout=None))
    (row,) = found.quarantine
    assert (row["code"], row["path"], row["action"]) == ("FORGOTTEN", "new-name.webp", "abstained")
    assert ids["i-dog-000"] not in {row["image_id"] for row in found.images}
    assert len(found.images) == 2


def test_confirmation_is_required(pool: ProjectPaths, ids: dict[str, str]) -> None:
    from typer.testing import CliRunner

    from pipeline_steps.cli import app

    result = CliRunner().invoke(app, ["--project", str(pool.root), "forget", ids["s-cow-000"]], input="n\n")
    assert result.exit_code == 1
    assert (pool.root / "data/demo/s-cow-000.ogg").exists()
    assert not (pool.root / "data/demo/takedowns.csv").exists()
    assert CliRunner().invoke(app, ["--project", str(pool.root), "forget", ids["s-cow-000"], "--json"]).exit_code == 2


def test_models_trained_on_the_item_are_listed(pool: ProjectPaths, sonify: Sonify, ids: dict[str, str]) -> None:
    from pipeline_steps.tracking.lineage.dvc_digests import hash_path
    from tests.factories.registered_models import register

    register(pool, [0.5, 0.6], pairs=hash_path(pool.pairs), version=1)
    register(pool, [0.5, 0.6], version=2)
    assert len(read_table(pool.pairs / "pairs.parquet", PAIRS)) == 2
    plan = json_output(sonify("forget", ids["s-dog-000"], "--dry-run", "--json"))
    assert any(text.startswith("model versions 1 learned from it") for text in plan["beyond"])
    assert any(text.startswith("model versions 2: their pairs are not in DVC's cache") for text in plan["beyond"])
    assert any("dvc repro train" in text for text in plan["rebuild"])


def test_unknown_item_is_an_error(pool: ProjectPaths, sonify: Sonify) -> None:
    result = sonify("forget", "ffffffffff", "--yes")
    assert result.exit_code == 2


@given(st.lists(st.tuples(CELLS, CELLS), max_size=8), st.sets(CELLS, max_size=3))
def test_rows_are_dropped_and_other_bytes_stay(rows: list[tuple[str, str]], names: set[str]) -> None:
    import io

    def text(kept: list[tuple[str, str]]) -> str:
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows([("file", "label"), *kept])
        return stream.getvalue()

    kept = [row for row in rows if row[0] not in names]
    assert drop_csv_rows(text(rows), "file", names) == (text(kept), len(rows) - len(kept))


def test_table_without_the_column_stays() -> None:
    assert drop_csv_rows("a,b\n1,2\n", "file", {"1"}) == ("a,b\n1,2\n", 0)


def test_mixtures_may_derive_from_any_item() -> None:
    item = sha256_bytes(b"x")[:32]
    assert may_derive_from("caption", item, item)
    assert may_derive_from("embed-audio", f"{item}:0", item)
    assert not may_derive_from("caption", "a" * 32, item)
    assert may_derive_from("train", "0123456789abcdef", item)
    assert not may_derive_from("evaluate-sound", "a" * 32, item)
    assert may_derive_from("evaluate-sound", "0123456789abcdef", item)


def test_unreadable_takedowns_are_an_error(tmp_path: Path) -> None:
    from pipeline_steps.core.errors import DataError

    text = takedowns.append_rows("", [("a" * 32, "image", "t", 'why, "so"')])
    assert takedowns.parse_takedowns(text) == {"a" * 32}
    assert takedowns.append_rows(text, [("a" * 32, "image", "t", "again")]) == text
    for broken in ("", "id\nx\n", "item_id\nnot-an-id\n"):
        with pytest.raises(DataError):
            takedowns.parse_takedowns(broken)
    limit = csv.field_size_limit(1000)  # the process-wide one, which reading a metadata table raises
    try:
        with pytest.raises(DataError, match="after line 1: field larger"):
            takedowns.parse_takedowns(f'item_id,reason\n{"a" * 32},"{"x" * 2000}"\n')
    finally:
        csv.field_size_limit(limit)


@pytest.mark.fault
@pytest.mark.parametrize("target", ["nowhere.csv", "list.csv", "."], ids=["dangling link", "link", "link to a folder"])
def test_linked_takedowns_are_an_error(pool: ProjectPaths, sonify: Sonify, target: str) -> None:
    """Take-downs of a missing list must not be undone, and the link must not be replaced by a new list."""
    from pipeline_steps.core.errors import DataError
    from pipeline_steps.ingest.config import IngestConfig
    from pipeline_steps.ingest.stage import dry_run

    raw = pool.root / "data/demo"
    (pool.root / "list.csv").write_text(takedowns.append_rows("", [("a" * 32, "image", "t", "")]))
    (raw / "takedowns.csv").symlink_to(Path("../..") / target)
    with pytest.raises(DataError, match=r"takedowns\.csv: cannot be read: a link"):
        dry_run(raw, IngestConfig(metadata=None, pool=None, holdout=None))
    refused = sonify("forget", "i-dog-000.webp", "--yes")
    assert refused.exit_code == 3
    assert (raw / "i-dog-000.webp").exists()
    assert (raw / "takedowns.csv").is_symlink()


@pytest.mark.fault
def test_folder_named_takedowns_is_an_error(tmp_path: Path) -> None:
    from pipeline_steps.core.errors import DataError

    assert takedowns.load_takedowns(tmp_path) is None
    (tmp_path / "takedowns.csv").mkdir()
    with pytest.raises(DataError, match="a folder, not a plain file"):
        takedowns.load_takedowns(tmp_path)


def test_an_item_of_a_named_pool_is_removed_from_its_folder_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from pipeline_steps.cli import app
    from pipeline_steps.commands.console import ingest_config
    from pipeline_steps.ingest.stage import run
    from pipeline_steps.project.create import create_project
    from tests.ingest.sources.test_pools import picture, sound

    monkeypatch.setenv("SONIFY_TRACKING", "off")
    pictures, sounds = tmp_path / "files/pictures", tmp_path / "files/sounds"
    for number in range(2):
        picture(pictures / f"{number}.png", number)
        sound(sounds / f"{number}.wav", 300 + 100 * number)
    table = tmp_path / "list.csv"
    table.write_text("file,licence\n0.png,MIT\n1.png,MIT\n0.wav,MIT\n1.wav,MIT\n")
    layout, _ = create_project(tmp_path / "project", pictures, sounds, table)
    run(ingest_config(layout), layout)
    result = CliRunner().invoke(app, ["--project", str(layout.root), "forget", "pictures/0.png", "--yes", "--json"])
    assert result.exit_code == 0, result.output
    assert json_output(result)["files"] == [str(pictures / "0.png")]
    assert not (pictures / "0.png").exists()
    assert (pictures / "1.png").exists()
    assert table.read_text() == "file,licence\n1.png,MIT\n0.wav,MIT\n1.wav,MIT\n"
    picture(pictures / "new.png", 0)  # the same bytes under another name
    table.write_text(table.read_text() + "new.png,MIT\n")
    assert run(ingest_config(layout), layout).metrics["codes"] == {"FORGOTTEN": 1}
