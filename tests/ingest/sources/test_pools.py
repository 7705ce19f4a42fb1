"""Named pools: paths that tell the pool, kinds, roles, licenses, links into named folders, errors that name pool and key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline_steps.core.config import parse_section
from pipeline_steps.core.errors import ConfigError, DataError
from pipeline_steps.core.pool_check import check_project_pools, pool_roots
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.ingest import stage
from pipeline_steps.ingest.candidates import DiscoveryResult
from pipeline_steps.ingest.config import DecoderLimitsConfig, IngestConfig
from pipeline_steps.ingest.sources.resolve import collect_all_candidates
from tests.factories.audio_streams import encode, tone

NAMES = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,5}", fullmatch=True)
FILES = st.from_regex(r"([a-z]{1,2}/){0,2}[a-z]{1,2}\.png", fullmatch=True)


def picture(path: Path, shade: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (shade % 256, shade // 256, 7)).save(path)
    return path


def sound(path: Path, hertz: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(tone(0.5, frequency=hertz)))
    return path


def config(**pools: dict[str, Any]) -> IngestConfig:
    params = {"ingest": {"pools": pools, "decoder": {"workers": 1}, "max_failed_fraction": 1.0}}
    return parse_section(IngestConfig, "ingest", params)


def paths(found: DiscoveryResult) -> set[str]:
    return {file.path for file in found.files}


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(NAMES, st.sets(FILES, min_size=1, max_size=4), min_size=1, max_size=4))
def test_paths_of_all_pools_are_distinct_and_lead_back(
    tmp_path_factory: pytest.TempPathFactory, pools: dict[str, set[str]]
) -> None:
    project = tmp_path_factory.mktemp("project")
    written: dict[str, bytes] = {}
    for number, (name, files) in enumerate(sorted(pools.items())):
        for place, file in enumerate(sorted(files)):
            path = picture(project / f"raw-{name}" / file, number * 1000 + place)
            written[f"{name}/{file}"] = path.read_bytes()
    found = collect_all_candidates(config(**{name: {"root": f"raw-{name}"} for name in pools}), project)
    assert not found.rejected
    assert len(found.files) == len(written)
    assert {file.path: Path(file.root, file.relative).read_bytes() for file in found.files} == written


def test_two_pools_with_the_same_relative_paths_become_two_items_with_content_ids(tmp_path: Path) -> None:
    picture(tmp_path / "a/x.png", 1)
    picture(tmp_path / "b/x.png", 2)
    picture(tmp_path / "b/copy.png", 1)
    sound(tmp_path / "a/x.wav", 440)
    pools = config(first={"root": "a"}, second={"root": "b"})
    stage.run(pools, ProjectPaths(tmp_path))
    rows = {row["path"]: row for row in stage.dry_run(tmp_path, pools).images}
    assert set(rows) == {"first/x.png", "second/x.png"}
    assert rows["first/x.png"]["sources"] == ["first/x.png", "second/copy.png"]
    one_root = stage.dry_run(tmp_path / "a")
    assert [row["path"] for row in one_root.images] == ["x.png"], "the form with one root has no prefix"
    assert one_root.images[0]["image_id"] == rows["first/x.png"]["image_id"]


def test_kind_role_and_license_of_a_pool(tmp_path: Path) -> None:
    picture(tmp_path / "a/x.png", 1)
    sound(tmp_path / "a/x.wav", 440)
    (tmp_path / "a/gone.wav").symlink_to("nowhere.wav")
    picture(tmp_path / "t/y.png", 2)
    (tmp_path / "t/table.csv").write_text("file,licence\ny.png,MIT\nz.wav,MIT\n")
    table = {"root": "t", "kind": "images", "metadata": "table.csv", "columns": {"license": "licence"}, "license": "cc0"}
    found = collect_all_candidates(
        config(a={"root": "a", "kind": "images", "license": "CC BY 4.0", "role": "holdout"}, t=table), tmp_path
    )
    assert {file.path: (file.license, file.holdout) for file in found.files} == {
        "a/x.png": ("CC-BY-4.0", True),
        "t/y.png": ("MIT", False),
    }
    assert not found.rejected, "neither the other kind's broken link nor its rows"
    assert dict(found.skipped_files) == {"audio in pool a": 2, "rows of another kind than pool t": 1}


def test_swapped_folders_are_named_with_their_keys(tmp_path: Path) -> None:
    picture(tmp_path / "a/x.png", 1)
    for number in range(2):
        sound(tmp_path / f"b/{number}.wav", 440 + number)
    pools = config(pictures={"root": "b", "kind": "images"}, sounds={"root": "a", "kind": "audio"})
    with pytest.raises(DataError, match="pictures has kind images, and 2 audio files") as caught:
        stage.run(pools, ProjectPaths(tmp_path))
    assert caught.value.action == "correct ingest.pools.pictures.root or ingest.pools.pictures.kind"
    assert str(stage.dry_run(tmp_path, pools).error) == str(caught.value), "sonify check predicts it"


def test_links_may_lead_into_named_folders_only(tmp_path: Path) -> None:
    picture(tmp_path / "a/own.png", 1)
    target = picture(tmp_path / "b/deep/other.png", 2)
    stored = picture(tmp_path / "store/3.png", 3)
    secret = picture(tmp_path / "elsewhere/4.png", 4)
    for name, path in (("to-b", target), ("to-store", stored), ("out", secret)):
        (tmp_path / f"a/{name}.png").symlink_to(os.path.relpath(path, tmp_path / "a"))
    pools = config(a={"root": "a"}, b={"root": "b"})
    found = collect_all_candidates(pools, tmp_path)
    assert paths(found) == {"a/own.png", "a/to-b.png", "b/deep/other.png"}
    assert {item.path: item.code for item in found.rejected} == {"a/to-store.png": "PATH_UNSAFE", "a/out.png": "PATH_UNSAFE"}
    assert "ingest.link_roots" in found.rejected[0].reason
    listed = collect_all_candidates(pools.model_copy(update={"link_roots": ["store"]}), tmp_path)
    assert paths(listed) == paths(found) | {"a/to-store.png"}
    decoded = stage.dry_run(tmp_path, pools)
    assert {source for row in decoded.images for source in row["sources"]} == paths(found), "decoded from where they lie"


def test_a_table_outside_the_root_is_named_by_its_absolute_path(tmp_path: Path) -> None:
    picture(tmp_path / "a/x.png", 1)
    table = tmp_path / "tables/a.csv"
    table.parent.mkdir()
    table.write_text("file\nx.png\n")
    assert paths(collect_all_candidates(config(a={"root": "a", "metadata": str(table)}), tmp_path)) == {"a/x.png"}
    with pytest.raises(ConfigError, match=r"ingest\.pools\.a\.metadata: \.\./tables/a\.csv: the path climbs"):
        collect_all_candidates(config(a={"root": "a", "metadata": "../tables/a.csv"}), tmp_path)


def test_take_downs_of_one_pool_hold_for_all(tmp_path: Path) -> None:
    picture(tmp_path / "a/x.png", 1)
    picture(tmp_path / "b/same.png", 1)
    pools = config(a={"root": "a"}, b={"root": "b"})
    (item,) = {file.item_id for file in collect_all_candidates(pools, tmp_path).files}
    (tmp_path / "b/takedowns.csv").write_text(f"item_id\n{item}\n")
    found = collect_all_candidates(pools, tmp_path)
    assert {file.path: file.code for file in found.rejected} == {"a/x.png": "FORGOTTEN", "b/same.png": "FORGOTTEN"}


@pytest.mark.parametrize(
    ("pools", "message"),
    [
        ({"a": {"root": "nowhere"}}, r"ingest\.pools\.a\.root: .*nowhere is not a folder"),
        ({"a": {"root": "ok", "layout": "table"}}, r"ingest\.pools\.a\.layout is table and ingest\.pools\.a\.metadata is null"),
        ({"a": {"root": "ok", "metadata": "no.csv"}}, r"ingest\.pools\.a\.metadata: no\.csv: no such file"),
        ({"a": {"root": "ok", "metadata": "t.csv", "pool": {"x": "1"}}}, r"ingest\.pools\.a\.metadata: t\.csv: no column 'x'"),
        ({"a": {"root": "ok", "layout": "webdataset"}}, r"ingest\.pools\.a\.layout: .*holds no tar"),
    ],
)  # fmt: skip
def test_errors_name_pool_and_key(tmp_path: Path, pools: dict[str, Any], message: str) -> None:
    (tmp_path / "ok").mkdir()
    (tmp_path / "ok/t.csv").write_text("file\n")
    with pytest.raises((ConfigError, DataError), match=message):
        collect_all_candidates(config(**pools), tmp_path)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"pools": {"Bad Name": {"root": "x"}}}, r"ingest\.pools\.Bad Name"),
        ({"pools": {"a": {}}}, r"ingest\.pools\.a\.root: Field required"),
        ({"pools": {"a": {"root": "x", "kinds": "images"}}}, r"ingest\.pools\.a\.kinds is unknown; did you mean kind"),
        ({"pools": {"a": {"root": "x"}}, "root": "y"}, "root belongs to the form with one root"),
        ({"pools": {"a": {"root": "x"}}, "metadata": "t.csv"}, "metadata belongs to the form with one root"),
    ],
)
def test_wrong_sections_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_section(IngestConfig, "ingest", {"ingest": section})


def test_no_source_at_all_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither ingest\.root nor ingest\.pools is set"):
        stage.run(IngestConfig(decoder=DecoderLimitsConfig(workers=1)), ProjectPaths(tmp_path))


def test_pool_check_reads_every_pool_and_its_dependency(tmp_path: Path) -> None:
    layout = ProjectPaths(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "b/inner").mkdir(parents=True)
    layout.params.write_text("ingest:\n  pools:\n    one: {root: a}\n    two: {root: b/inner}\n")
    layout.graph.write_text("stages:\n  ingest:\n    cmd: x\n    deps: ['${ingest.pools.one.root}', b]\n")
    check_project_pools(layout)
    assert pool_roots({"ingest": {"pools": {"one": {"root": "a"}}}}) == {"one": "a"}
    assert pool_roots({"ingest": {"root": "a"}}) == {"": "a"}
    layout.graph.write_text("stages:\n  ingest:\n    cmd: x\n    deps: [a]\n")
    with pytest.raises(ConfigError, match=r"ingest\.pools\.two\.root: b/inner is no dependency of stage ingest"):
        check_project_pools(layout)
    (tmp_path / "b/inner/gone").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"ingest\.pools\.two\.root: DVC cannot hash"):
        check_project_pools(layout)
