"""One flipped bit in a file of a finished stage: the next reader ends with exit code 6, the file's name and the cure.

`benchmarks/bit_flips.py` does the same to every file of a whole finished demo, in processes of their own.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from benchmarks.bit_flips import OUTS, READERS
from pipeline_steps.__main__ import run_stage
from pipeline_steps.core.atomic import link_or_copy
from pipeline_steps.core.checksums import NAME, write_checksums
from pipeline_steps.core.errors import IntegrityError
from pipeline_steps.core.media_shards import INDEX, MediaShardReader
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import SHARD_INDEX
from pipeline_steps.core.tables import read_table
from pipeline_steps.diffusion.pipelines.auto import AutoAudio2ImagePipeline
from pipeline_steps.models.audio.yamnet import YamNet
from pipeline_steps.pair.release.export import export_webdataset
from pipeline_steps.retrieve.config import RetrieveConfig
from pipeline_steps.retrieve.stage import open_pool_index
from tests.factories.demo_project import PROJECT, copy_rows, demo_rows

FLIPS_PER_FILE = 3
LABELS = {"dog", "train", "cow", "bird"}


@contextmanager
def flipped(path: Path, bit: int) -> Iterator[None]:
    """One bit of the file changed, in a copy of its own; the time of change as before."""
    intact, times = path.read_bytes(), path.stat()
    payload = bytearray(intact)
    payload[bit // 8] ^= 1 << bit % 8
    path.unlink()  # it may be a hard link
    path.write_bytes(bytes(payload))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    try:
        yield
    finally:
        path.write_bytes(intact)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> ProjectPaths:
    """A few items of the demo, from ingest to pair."""
    layout = ProjectPaths(tmp_path_factory.mktemp("flips") / "project")
    layout.root.mkdir()
    shutil.copy(PROJECT / "params.yaml", layout.params)
    params = YAML().load(layout.params)
    params["retrieve"]["annoy"]["trees"] = 4
    YAML().dump(params, layout.params)
    copy_rows(layout.root, [row for row in demo_rows() if row["label"] in LABELS])
    shutil.copytree(assets, layout.assets, copy_function=link_or_copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(layout.root)
        for stage in ("ingest", "caption", "embed", "retrieve", "pair"):
            run_stage(stage, layout)
    return layout


def read_next(layout: ProjectPaths, name: str, folder: Path) -> None:
    """Run the stage or command that reads a file of the project next."""
    _, reader = next(entry for entry in READERS if re.match(entry[0], name))
    commands: dict[str, Callable[[], object]] = {
        "find": lambda: open_pool_index(layout, RetrieveConfig()),
        "export": lambda: export_webdataset(layout, folder / "release"),
    }
    commands.get(reader, lambda: run_stage(reader, layout))()


def test_every_file_of_the_stages(project: ProjectPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.root)
    generator = random.Random(0)
    files = [
        path.relative_to(project.root)
        for out in OUTS
        for path in sorted((project.root / out).glob("*"))
        if path.is_file() and path.suffix != ".tar" and out not in {"data/assets", "models/audio2image"}
    ]
    unread = {"README.md", "croissant.json"}
    by_evaluate = {"data/catalog/quarantine.parquet", "data/embeddings/quarantine.parquet", "data/captions/meta.json"}
    by_evaluate |= {"data/pairs/abstained.parquet"}
    tried = [path for path in files if path.name not in unread and path.as_posix() not in by_evaluate]
    assert {path.suffix for path in tried} == {".parquet", ".json", ".npy", ".ann", ".sha256"}
    here = ProjectPaths()
    for path in tried:
        for _ in range(FLIPS_PER_FILE):
            bit = generator.randrange(8 * path.stat().st_size)
            with flipped(path, bit), pytest.raises(IntegrityError) as caught:
                read_next(here, path.as_posix(), tmp_path / f"{path.name}-{bit}")
            out = path.parent.as_posix()
            assert f"dvc checkout {out}" in caught.value.action, (path, bit, caught.value)
            if path.name != NAME:
                assert path.as_posix() in caught.value.reason
                assert caught.value.action.endswith(f"dvc repro --force {OUTS[out]}")


def test_items_of_media_shards(project: ProjectPaths) -> None:
    generator = random.Random(0)
    rows = read_table(project.media / INDEX, SHARD_INDEX).to_pylist()
    for row in generator.sample(rows, 20):
        shard = project.media / row["shard"]
        with flipped(shard, 8 * row["offset"] + generator.randrange(8 * row["size"])):
            with pytest.raises(IntegrityError, match=f"{row['shard']}: bytes of {row['item_id']}") as caught:
                MediaShardReader(project.media).payload(row["item_id"])
            assert f"dvc checkout {project.media}; or dvc repro --force ingest" in caught.value.action


def test_every_file_of_an_exported_model(exported_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models/audio2image"
    shutil.copytree(exported_model, folder)
    write_checksums("train", folder)
    AutoAudio2ImagePipeline.from_pretrained(folder)
    generator = random.Random(0)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != NAME]
    assert len(files) > 10
    for path in files:
        with flipped(path, generator.randrange(8 * path.stat().st_size)), pytest.raises(IntegrityError) as caught:
            load_and_encode(folder)
        assert f"{path.relative_to(tmp_path)}: " in caught.value.reason
        assert caught.value.action == f"rm {path} && dvc checkout {folder}; or dvc repro --force train"


def load_and_encode(folder: Path) -> None:
    """What drawing reads: the pipeline, its tagger, the text encoder."""
    pipeline = AutoAudio2ImagePipeline.from_pretrained(folder)
    pipeline.encoder.tagger.load()


def test_weights_of_stage_assets(assets: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data/assets"
    folder.mkdir(parents=True)
    for file in (*YamNet.files, "meta.json"):
        link_or_copy(assets / file, folder / file)
    write_checksums("assets", folder)
    YamNet(folder).load()
    for file in (*YamNet.files, "meta.json"):
        with flipped(folder / file, 4_321), pytest.raises(IntegrityError, match=f"{file}: sha256 is") as caught:
            YamNet(folder).load()
        assert f"dvc checkout {folder}; or dvc repro --force assets" in caught.value.action
