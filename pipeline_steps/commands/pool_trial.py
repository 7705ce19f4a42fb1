"""Trial of a pool: the stages from ingest to pair on a sample of it, in a folder of their own, to predict a run.

Results of the sample are in the project's result cache, so that the run does not compute them again.
"""

from __future__ import annotations

import importlib
import logging
import resource
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline_steps.core.config import config_class, load_params, parse_section
from pipeline_steps.core.errors import StageError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import AUDIO, IMAGES
from pipeline_steps.core.tables import read_table, write_table
from pipeline_steps.ingest.config import IngestConfig
from pipeline_steps.pair.stage import MIN_TEST_PAIRS


@dataclass
class PoolTrial:
    """What the stages did with a sample.

    Attributes:
        images, audio: items of the pool, without those held out.
        sampled_images, sampled_audio: items that went through the stages.
        splits: pairs of the sample by split; empty if a stage stopped.
        abstained: images of the sample without a pair, by code.
        seconds: duration of each stage. Cached results take none.
        pool_bytes: size of the outs of ingest, which hold the whole pool.
        sample_bytes: size of the outs of the sample.
        peak_memory_bytes: of this process.
        failed_stage, failure: the stage that stopped, and why.
    """

    images: int = 0
    audio: int = 0
    sampled_images: int = 0
    sampled_audio: int = 0
    splits: dict[str, int] = field(default_factory=dict)
    abstained: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    pool_bytes: int = 0
    sample_bytes: int = 0
    peak_memory_bytes: int = 0
    failed_stage: str = ""
    failure: StageError | None = None

    @property
    def scale(self) -> float:
        """Images of the pool per image of the sample."""
        return self.images / max(1, self.sampled_images)

    def expected_pairs(self) -> dict[str, int]:
        """Pairs of the whole pool by split, in proportion to its images."""
        return {split: round(count * self.scale) for split, count in self.splits.items()}


def try_pool(layout: ProjectPaths, config: IngestConfig, sample: int) -> PoolTrial:
    """Run the stages from ingest to pair on at most `sample` images and `sample` clips; the first StageError ends the trial.

    Args:
        layout: the project, of which only the result cache is written.
        config: section `ingest` of its parameters.
        sample: items of each kind. Ids are hashes of the content, so the first ones are a random choice.
    """
    trial = PoolTrial()
    layout.runs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="trial-", dir=layout.runs) as folder:
        own = ProjectPaths(Path(folder).resolve())
        (layout.root / ".cache").mkdir(exist_ok=True)
        (own.root / ".cache").symlink_to((layout.root / ".cache").resolve())
        params = load_params(layout.params)
        stages = ["ingest", "caption", "embed", "retrieve", "pair"]
        if layout.assets.is_dir():
            own.assets.parent.mkdir(parents=True)
            own.assets.symlink_to(layout.assets.resolve())
        else:
            stages.insert(0, "assets")
        for stage in stages:
            start = time.monotonic()
            try:
                _run(stage, _absolute(config, layout.root) if stage == "ingest" else None, params, own, trial)
            except StageError as error:
                trial.failed_stage, trial.failure = stage, error
                break
            if stage == "ingest":
                _keep_sample(own, sample, trial)
            trial.seconds[stage] = round(time.monotonic() - start, 1)
        trial.pool_bytes = _size(own.catalog, own.media)
        trial.sample_bytes = _size(own.captions, own.embeddings, own.retrieval, own.pairs)
    trial.peak_memory_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return trial


def _size(*folders: Path) -> int:
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def _run(stage: str, config: Any, params: dict[str, Any], own: ProjectPaths, trial: PoolTrial) -> None:
    module = importlib.import_module(f"pipeline_steps.{stage}.stage")
    config = config or parse_section(config_class(stage), stage, params)
    logging.getLogger(__name__).info("trying stage %s", stage)
    if stage != "pair":
        module.run(config, own)
        return
    report = module.build_pairs(config, own)  # without a tracking run
    trial.splits = dict(report.metrics["splits"])
    trial.abstained = dict(report.metrics["abstained_all"])


def _absolute(config: IngestConfig, root: Path) -> IngestConfig:
    """The section `ingest` with roots that do not depend on the project folder."""
    pools = {name: pool.model_copy(update={"root": str((root / pool.root).resolve())}) for name, pool in config.pools.items()}
    update: dict[str, Any] = {"pools": pools, "link_roots": [str((root / folder).resolve()) for folder in config.link_roots]}
    if config.root is not None:
        update["root"] = str((root / config.root).resolve())
    return config.model_copy(update=update)


def _keep_sample(own: ProjectPaths, sample: int, trial: PoolTrial) -> None:
    """Reduce the catalog to the sample, without held-out items; media shards stay whole."""
    for name, schema in (("images", IMAGES), ("audio", AUDIO)):
        path = own.catalog / f"{name}.parquet"
        rows = [row for row in read_table(path, schema).to_pylist() if not row["holdout"]]
        kept = sorted(rows, key=lambda row: str(row[schema.schema.names[0]]))[:sample]
        setattr(trial, name, len(rows))
        setattr(trial, f"sampled_{name}", len(kept))
        path.unlink()
        write_table(path, schema, kept)
    for record in own.catalog.glob("checksums.sha256"):  # it describes the whole catalog
        record.unlink()


def prediction(trial: PoolTrial, layout: ProjectPaths, params: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Lines that describe the trial, and reasons for which a run would stop or end without metrics."""
    exact = trial.sampled_images == trial.images and trial.sampled_audio == trial.audio
    basis = "all of the pool" if exact else f"a sample of {trial.sampled_images} images and {trial.sampled_audio} clips"
    lines = [f"tried the stages up to {trial.failed_stage or 'pair'} on {basis}"]
    problems: list[str] = []
    if trial.failure is not None:
        problems.append(f"{trial.failed_stage} would stop: {trial.failure}")
        return lines, problems
    pairs = trial.expected_pairs()
    shown = ", ".join(f"{split} {count}" for split, count in pairs.items())
    lines.append(f"{'' if exact else 'about '}{sum(pairs.values())} pairs of {trial.images} images ({shown})")
    lines += [f"without a pair, {code}: {count} of the sampled images" for code, count in sorted(trial.abstained.items())]
    if not pairs.get("train"):
        problems.append("train would stop: no training pair; lower pair.splits.audio.test, or add images and clips")
    truth = (params.get("evaluate") or {}).get("ground_truth")
    clusters = int((params.get("evaluate") or {}).get("min_clusters", 30))
    if pairs.get("test", 0) < MIN_TEST_PAIRS and not truth:
        problems.append(
            f"evaluate would report no metrics: too few to judge, {pairs.get('test', 0)} of {MIN_TEST_PAIRS} test pairs; "
            "raise pair.splits.audio.test, add images and clips, or name true pairs in evaluate.ground_truth"
        )
    elif pairs.get("test", 0) < clusters:
        lines.append(f"intervals will be wide: {pairs.get('test', 0)} test pairs, fewer than evaluate.min_clusters {clusters}")
    seconds = sum(trial.seconds.values()) * trial.scale
    free = shutil.disk_usage(layout.root).free
    needed = 2 * (trial.pool_bytes + trial.sample_bytes * trial.scale)  # outs and their copies in DVC's cache
    lines.append(
        f"stages up to pair: about {seconds / 60:.0f} min more than what is cached now, {needed / 1e6:.0f} MB of "
        f"{free / 1e9:.0f} GB free, {trial.peak_memory_bytes / 1e9:.1f} GB of memory in the trial"
    )
    if needed > free:
        problems.append(f"the disk would be full: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
    return lines, problems
