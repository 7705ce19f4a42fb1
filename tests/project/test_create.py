"""Projects beside the source: made by `sonify init`, run by plain `dvc repro`, copied, joined, upgraded."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from pipeline_steps.cli import app
from pipeline_steps.core.config import config_class, load_params, parse_section
from pipeline_steps.core.errors import ConfigError
from pipeline_steps.core.pool_check import check_project_pools
from pipeline_steps.core.presets import flatten
from pipeline_steps.core.schemas import AUDIO, IMAGES
from pipeline_steps.core.tables import read_table
from pipeline_steps.project.code_digests import PACKAGE
from pipeline_steps.project.create import create_project, renew_project
from tests.ingest.sources.test_pools import picture, sound

REPOSITORY = Path(__file__).resolve().parents[2]


def run(root: Path, *command: str, package: Path = PACKAGE, fails: bool = False) -> str:
    """Output of a command in a project, with the package of `package`'s folder."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "PATH": path, "DVC_NO_ANALYTICS": "1"}
    environment.pop("DVC_STAGE", None)
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert fails == bool(done.returncode), done.stdout + done.stderr
    return done.stdout + done.stderr


def dvc(root: Path, *arguments: str, package: Path = PACKAGE, fails: bool = False) -> str:
    return run(root, sys.executable, "-m", "dvc", *arguments, package=package, fails=fails)


def folders(root: Path, shade: int = 0) -> tuple[Path, Path]:
    """A folder of pictures and one of sounds, with the same names in both."""
    for number in range(3):
        picture(root / f"pictures/{number}.png", shade + number)
        sound(root / f"sounds/{number}.wav", 300 + 100 * number + shade)
    return root / "pictures", root / "sounds"


def snapshot(root: Path) -> dict[str, tuple[str, int]]:
    """Name -> digest and time of every file."""
    return {
        str(path.relative_to(root)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def catalog(root: Path) -> dict[str, str]:
    """Path -> id of all items."""
    rows = [(row["path"], row["image_id"]) for row in read_table(root / "data/catalog/images.parquet", IMAGES).to_pylist()]
    rows += [(row["path"], row["audio_id"]) for row in read_table(root / "data/catalog/audio.parquet", AUDIO).to_pylist()]
    return dict(rows)


def skipped(output: str, stage: str) -> bool:
    return f"Stage '{stage}' didn't change, skipping" in output


def test_two_projects_beside_each_other(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for root, shade in ((first, 0), (second, 50)):
        result = CliRunner().invoke(
            app, ["init", str(root), *zip_options(*folders(tmp_path / f"files-{root.name}", shade)), "--json"]
        )
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["next"] == f"next: cd {root} && dvc repro"
    before = snapshot(tmp_path / "files-first")
    assert "Running stage 'ingest'" in dvc(first, "repro", "ingest")
    kept = snapshot(first)
    dvc(second, "repro", "ingest")
    assert snapshot(first) == kept
    assert snapshot(tmp_path / "files-first") == before
    assert set(catalog(first)) == {f"{pool}.{suffix}" for pool, suffix in named(3)} == set(catalog(second))
    assert not set(catalog(first).values()) & set(catalog(second).values())

    assert skipped(dvc(first, "repro", "ingest"), "ingest"), "nothing has changed"
    assert not [line for line in run(first, "git", "status", "--short").splitlines() if "data/" in line]
    for folder, file in (("pictures", picture(first.parent / "files-first/pictures/new.png", 9)), ("sounds", None)):
        file = file or sound(first.parent / "files-first/sounds/new.wav", 900)
        changes = json.loads(dvc(first, "status", "--json", "ingest"))["ingest"]
        assert {"changed deps": {str(file.parent): "modified"}} in changes, f"DVC depends on the pool {folder}"
        file.unlink()


def named(count: int) -> list[tuple[str, str]]:
    return [(f"pictures/{n}", "png") for n in range(count)] + [(f"sounds/{n}", "wav") for n in range(count)]


def zip_options(pictures: Path, sounds: Path) -> list[str]:
    return ["--pictures", str(pictures), "--sounds", str(sounds)]


def test_a_copied_project_leaves_the_original_alone(tmp_path: Path) -> None:
    original, copy = tmp_path / "original", tmp_path / "copy"
    create_project(original, *folders(original / "files"))
    assert load_params(original / "params.yaml")["ingest"]["pools"]["pictures"]["root"] == "files/pictures"
    dvc(original, "repro", "ingest")
    before = snapshot(original)
    shutil.copytree(original, copy, symlinks=True)
    assert not [path for path in copy.rglob("*") if path.is_file() and str(original).encode() in path.read_bytes()]
    assert skipped(dvc(copy, "repro", "ingest"), "ingest")
    picture(copy / "files/pictures/new.png", 99)
    assert "Running stage 'ingest'" in dvc(copy, "repro", "ingest")
    assert len(catalog(copy)) == 7
    assert snapshot(original) == before


def test_a_project_inside_other_repositories(tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    outer.mkdir()
    run(outer, "git", "init", "--quiet")
    dvc(outer, "init", "--quiet")
    (outer / "dvc.yaml").write_text("stages:\n  a: {cmd: touch out, outs: [out]}\n")
    before = snapshot(outer)
    _, done = create_project(outer / "inner", *folders(tmp_path / "files"))
    assert f"{outer / 'inner'}: in the git repository {outer}" in done
    assert not (outer / "inner/.git").exists()
    assert dvc(outer / "inner", "root").strip() == "."
    unchanged = {name: state for name, state in snapshot(outer).items() if name in before and not name.startswith(".git/")}
    assert unchanged == {name: state for name, state in before.items() if not name.startswith(".git/")}
    assert json.loads(dvc(outer, "status", "--json")).keys() == {"a"}, "the outer project does not see the inner one"


def test_values_differ_from_the_defaults_and_nothing_of_the_demo_is_left(tmp_path: Path) -> None:
    layout, _ = create_project(tmp_path / "p", *folders(tmp_path / "files"), preset="embedded")
    text = layout.params.read_text() + layout.graph.read_text()
    for word in ("demo", "manifest", "gold", "split: pool"):
        assert word not in text
    params = load_params(layout.params)
    defaults = load_params(REPOSITORY / "params.yaml")
    assert set(params) == set(defaults)
    written = {key: value for key, value in flatten({k: v for k, v in params.items() if k != "ingest"}) if value != {}}
    assert {key: dict(flatten(defaults))[key] for key in written} == written


@pytest.mark.parametrize("section", sorted(load_params(REPOSITORY / "params.yaml")))
def test_one_key_of_a_section_leaves_all_others_at_the_demo_values(section: str) -> None:
    """A partial `params.yaml` means the same as one that writes everything out."""
    own = {"root", "metadata", "columns", "pool", "holdout"} if section == "ingest" else {"ground_truth"}
    values = {key: value for key, value in load_params(REPOSITORY / "params.yaml")[section].items() if key not in own}
    model = config_class(section)

    def parsed(value: dict[str, Any]) -> dict[str, Any]:
        return dict(flatten(parse_section(model, section, {section: value}).model_dump()))

    full, empty = parsed(values), parsed({})
    assert {key: full[key] for key in empty if key in full} == {key: value for key, value in empty.items() if key in full}
    for key, value in flatten(values):
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        one = parsed(nested)
        assert {name: one[name] for name in empty if name in one} == {name: empty[name] for name in empty if name in one}, key


def test_metadata_beside_the_folders_and_relative_to_them(tmp_path: Path) -> None:
    pictures, sounds = folders(tmp_path / "files")
    names = [f"pictures/{n}.png" for n in range(3)] + [f"sounds/{n}.wav" for n in range(2)]
    table = tmp_path / "files/list.csv"
    table.write_text("Path,licence,url\n" + "".join(f"{name},MIT,x\n" for name in names))
    first, _ = create_project(tmp_path / "first", pictures, sounds, table)
    pool = load_params(first.params)["ingest"]["pools"]["pictures"]
    assert (pool["root"], pool["metadata"]) == (str(tmp_path / "files"), "list.csv")
    assert pool["columns"] == {"file": "Path", "license": "licence", "source": "url"}
    dvc(first.root, "repro", "ingest")
    assert len(catalog(first.root)) == 5
    other = tmp_path / "other/list.csv"
    other.parent.mkdir()
    other.write_text("file\n" + "".join(f"{name.split('/')[1]}\n" for name in names))
    second, _ = create_project(tmp_path / "second", pictures, sounds, other)
    pools = load_params(second.params)["ingest"]["pools"]
    assert (pools["sounds"]["root"], pools["sounds"]["metadata"]) == (str(sounds), str(other))
    deps = YAML(typ="safe").load(second.graph.read_text())["stages"]["ingest"]["deps"]
    assert deps == [str(pictures), str(other), str(sounds)]


def test_pools_and_ground_truth_of_params_reach_dvc_yaml_by_init(tmp_path: Path) -> None:
    layout, _ = create_project(tmp_path / "p", *folders(tmp_path / "files"))
    params = load_params(layout.params)
    extra = tmp_path / "more"
    picture(extra / "x.png", 77)
    params["ingest"]["pools"]["more"] = {"root": str(extra)}
    params["evaluate"]["ground_truth"] = "truth.csv"
    with layout.params.open("w") as handle:
        YAML().dump(params, handle)
    with pytest.raises(ConfigError, match=r"ingest\.pools\.more\.root: .* is no dependency .* sonify init \."):
        check_project_pools(layout)
    output = dvc(layout.root, "repro", "ingest", fails=True)
    assert "ingest.pools.more.root" in output
    assert CliRunner().invoke(app, ["init", str(layout.root)]).exit_code == 0
    check_project_pools(layout)
    assert YAML(typ="safe").load(layout.graph.read_text())["stages"]["evaluate"]["deps"][0] == "truth.csv"


def test_wrong_calls_are_refused_and_write_nothing(tmp_path: Path) -> None:
    pictures, sounds = folders(tmp_path / "files")
    table = tmp_path / "t.csv"
    table.write_text("name,file\na,nowhere.png\n")
    for arguments, message in (
        (["--pictures", str(pictures)], "belong together"),
        ([], "is no project"),
        (zip_options(tmp_path / "gone", sounds), "--pictures: .*gone is not a folder"),
        ([*zip_options(pictures, sounds), "--preset", "trail"], "there is no preset 'trail'"),
        ([*zip_options(pictures, sounds), "--metadata", str(table)], "no column of .* names files"),
    ):
        result = CliRunner().invoke(app, ["init", str(tmp_path / "p"), *arguments])
        assert result.exit_code == 2, arguments
        assert not (tmp_path / "p/params.yaml").exists()
        assert re.search(message, result.stderr), result.stderr
    with pytest.raises(ConfigError, match="overlaps with"):
        create_project(pictures / "project", pictures, sounds)
    layout, _ = create_project(tmp_path / "p", pictures, sounds)
    with pytest.raises(ConfigError, match=r"params\.yaml exists"):
        create_project(tmp_path / "p", pictures, sounds)
    layout.graph.write_text("stages: {}\n")
    with pytest.raises(ConfigError, match="was not written by sonify init"):
        renew_project(layout)


def test_one_folder_for_both_is_one_pool(tmp_path: Path) -> None:
    folders(tmp_path / "files")
    layout, _ = create_project(tmp_path / "p", tmp_path / "files", tmp_path / "files")
    assert load_params(layout.params)["ingest"] == {"pools": {"media": {"root": str(tmp_path / "files")}}}


@pytest.mark.parametrize(
    ("path", "stages"),
    [
        ("pair/splits.py", {"pair"}),
        ("evaluate/report/a_new_section.py", {"evaluate"}),
        ("models/text_audio/clap.py", {"embed", "evaluate"}),
        ("commands/run.py", set()),
        ("project/create.py", set()),
    ],
)
def test_an_upgrade_makes_stale_what_uses_the_changed_file(up_to_date: tuple[Path, Path], path: str, stages: set[str]) -> None:
    root, package = up_to_date
    target = package / path
    before = target.read_bytes() if target.exists() else None
    target.write_bytes((before or b"") + b"\n# another\n")
    try:
        run(root, sys.executable, "-m", "pipeline_steps.project", package=package)
        found = json.loads(dvc(root, "status", "--json", package=package))
    finally:
        target.unlink() if before is None else target.write_bytes(before)
    assert found.pop("code")
    assert set(found) == stages
    assert all(f"code.{name}" in str(change) for name, change in found.items())


def test_a_plan_of_prefect_does_not_run_everything_after_the_stage_that_always_runs(up_to_date: tuple[Path, Path]) -> None:
    from flows.dvc_graph import make_plan

    root, package = up_to_date
    run(root, sys.executable, "-m", "pipeline_steps.project", package=package)
    assert {planned.node.name for planned in make_plan(root) if planned.runs} == {"code"}


@pytest.fixture(scope="module")
def up_to_date(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A project whose outs are a few bytes that DVC believes to be current, and the package that it uses."""
    folder = tmp_path_factory.mktemp("upgrade")
    package = folder / "environment" / PACKAGE.name
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    layout, _ = create_project(folder / "project", *folders(folder / "files"))
    for stage in YAML(typ="safe").load(layout.graph.read_text())["stages"].values():
        for out in [*stage["outs"], *stage.get("metrics", ())]:
            (path,) = (layout.root / name for name in ([out] if isinstance(out, str) else out))
            if path != layout.code:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("{}")
    dvc(layout.root, "commit", "--force", "--quiet", package=package)
    assert set(json.loads(dvc(layout.root, "status", "--json", package=package))) == {"code"}
    return layout.root, package


def test_folders_without_files_of_their_kind_are_refused(tmp_path: Path) -> None:
    pictures, sounds = folders(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty has no file of kind image"):
        create_project(tmp_path / "project", tmp_path / "empty", sounds)
    with pytest.raises(
        ConfigError, match=r"sounds has no file of kind image; it has 3 of kind audio: are the two folders swapped\?"
    ):
        create_project(tmp_path / "project", sounds, pictures)
    assert not (tmp_path / "project").exists()
    (tmp_path / "empty/shard-000.tar").write_bytes(b"")
    create_project(tmp_path / "archives", tmp_path / "empty", sounds)
    _, done = create_project(tmp_path / "project", pictures, sounds)
    assert done[0] == "3 images, 3 clips found by their names"


def test_a_typo_in_the_section_of_a_late_stage_is_found_first(tmp_path: Path) -> None:
    pictures, sounds = folders(tmp_path)
    layout, _ = create_project(tmp_path / "project", pictures, sounds)
    params = YAML().load(layout.params)
    params["evaluate"]["num_bootstraps"] = 7
    YAML().dump(params, layout.params)
    output = dvc(layout.root, "repro", fails=True)
    assert "num_bootstraps" in output
    assert "stage 'ingest'" not in output


def test_a_project_in_a_repository_leaves_its_index_alone(tmp_path: Path) -> None:
    pictures, sounds = folders(tmp_path)
    run(tmp_path, "git", "init", "--quiet", ".")
    create_project(tmp_path / "project", pictures, sounds)
    assert "A " not in run(tmp_path, "git", "status", "--short")
