"""Stage `train`: pairs -> audio-to-image diffusion model. The only module of the package that accesses the disk."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from filelock import FileLock
from lightning.pytorch.callbacks import LambdaCallback

from pipeline_steps import tracking
from pipeline_steps.core.array_types import ByteArray
from pipeline_steps.core.atomic import write_bytes, write_json, write_text
from pipeline_steps.core.checksums import write_checksums
from pipeline_steps.core.errors import ConfigError, DataError
from pipeline_steps.core.feature_store import FeatureStore
from pipeline_steps.core.gpu_memory import gpu_memory_guard
from pipeline_steps.core.hashing import fingerprint, sha256_file
from pipeline_steps.core.host_memory import release_unused_memory
from pipeline_steps.core.media_shards import INDEX, MediaShardReader
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import AUDIO, PAIRS
from pipeline_steps.core.source_files import PACKAGE, imported_files
from pipeline_steps.core.stage_report import StageReport
from pipeline_steps.core.tables import read_table
from pipeline_steps.diffusion.audio_tokens import AudioTokenizer
from pipeline_steps.train.audio_feature_cache import (
    TOKEN_COLUMNS,
    build_tokenizer,
    cache_fingerprint,
    distinct_clips,
    load_or_encode_clips,
)
from pipeline_steps.train.callbacks import (
    EMACallback,
    ProgressCallback,
    SampleGridCallback,
    StepCheckpoint,
    ThroughputCallback,
)
from pipeline_steps.train.checkpoint_io import AtomicCheckpointIO, read_checkpoint
from pipeline_steps.train.compilation import inductor_or_eager
from pipeline_steps.train.config import TrainConfig
from pipeline_steps.train.distributed import (
    DistributedSetup,
    apply_memory_settings,
    check_batch_size,
    kill_child_processes,
    resolve_setup,
    verify_ranks_agree,
)
from pipeline_steps.train.history import encode_png, final_metrics, loss_csv, validation_csv
from pipeline_steps.train.lightning_module import LOG_EVERY_N_STEPS, DiffusionModule, NonFiniteLossError
from pipeline_steps.train.microbatches import MEMORY_KEYS, MORE_MEMORY, find_microbatches
from pipeline_steps.train.recipes import RECIPES
from pipeline_steps.train.recipes.base import Recipe, RecipeSettings, TrainingInputs, TrainingRun
from pipeline_steps.train.scenes import SceneReader, compose_scenes
from pipeline_steps.train.tracking_logger import TrackingLogger

__all__ = ["TrainConfig", "run"]

log = logging.getLogger(__name__)

CHECKPOINT = "last"
DIAGNOSIS = "not-finite.json"
MICROBATCHES = "microbatches.json"
SPLITS = ("train", "val")
PAIR_COLUMNS = ["image_id", "split", "tracks"]
"""Columns that training reads."""
Pairs = dict[str, list[dict[str, Any]]]
"""Pair rows by split."""


def run(config: TrainConfig, layout: ProjectPaths) -> StageReport:
    """Train on the pairs of split `train`, validate on split `val`, and export the averaged weights.

    Split `test` is never read.

    Raises:
        ConfigError: `resume_from_checkpoint` does not exist, or a batch size is too small.
        DataError: there are too few training pairs, or the loss was not finite several times in a row.
        ResourceError: a GPU is requested and there is none, or its memory is too small.
        IntegrityError: the checkpoint belongs to another run, or is not a plain checkpoint.
    """
    report = StageReport("train")
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    setup = resolve_setup(config.device, config.precision, config.performance)
    check_batch_size(config.recipe_config.phase.batch_size, setup.partition, f"train.{config.recipe}")
    recipe = build_recipe(config, layout, setup)
    pairs = read_pairs(layout)
    report.n_in = report.n_ok = sum(len(rows) for rows in pairs.values())
    counts = {f"pairs_{split}": len(rows) for split, rows in pairs.items()}
    counts["clips_train"] = len(distinct_clips(pairs["train"]))
    encoder = build_tokenizer(config.audio, layout.assets, layout.root, setup.device.type)
    digest = run_digest(config, layout, encoder, recipe, setup)
    folder = layout.runs / "train" / digest
    tracked = tracking.run("train", layout, config, inputs=[layout.pairs, layout.media], resume_key=digest)
    lock = FileLock(folder / "prepare.lock")  # the first process computes, the others load its results
    with tracked if setup.is_first else nullcontext(tracking.NoOpTracker()) as tracker:
        with lock if setup.processes > 1 else nullcontext(), gpu_memory_guard(MEMORY_KEYS, MORE_MEMORY):
            inputs = _load_inputs(config, layout, encoder, pairs, digest, report)
            prepared = recipe.prepare(inputs)
            apply_memory_settings(prepared.module.unet, setup)
            if config.performance.accumulate_grad_batches == "auto":
                _choose_microbatches(config, folder / MICROBATCHES, prepared, setup)
        del inputs, pairs  # rows of a million pairs are gigabytes
        release_unused_memory()
        _train(config, folder, prepared, TrackingLogger(tracker, prepared.module.objective, config.validation_steps), setup)
        if not setup.is_first:
            sys.exit(0)  # process 0 exports and reports
        module = prepared.module
        _export(layout, folder, prepared)
        report.metrics |= {
            **final_metrics(module.history, module.validation),
            "num_parameters": sum(parameter.numel() for parameter in module.denoiser.parameters()),
            **counts,
        }
        logged = ("num_parameters", "pairs_train", "pairs_val", "clips_train")
        tracker.log_metrics({f"train/{name}": report.metrics[name] for name in logged})
        tracker.log_model(layout.model)
    # The model is complete. The checkpoint is large and is not needed any more.
    (folder / f"{CHECKPOINT}.ckpt").unlink(missing_ok=True)
    return report


def build_recipe(config: TrainConfig, layout: ProjectPaths, setup: DistributedSetup) -> Recipe:
    """Configured recipe."""
    settings = RecipeSettings(
        seed=config.seed,
        resolution=config.resolution,
        audio=config.audio,
        image_augmentation=config.image_augmentation,
        optimizer=config.optimizer,
        sampling=config.sampling,
        max_nonfinite_steps=config.max_nonfinite_steps,
        setup=setup,
        root=layout.root,
        assets=layout.assets,
    )
    return RECIPES.get(config.recipe)(config.recipe_config, settings)


def run_digest(
    config: TrainConfig, layout: ProjectPaths, encoder: AudioTokenizer, recipe: Recipe, setup: DistributedSetup
) -> str:
    """Identity of a run: parameters, data, frozen models, imported code, torch and hardware.

    A checkpoint is valid only for the run that wrote it.
    """
    return fingerprint(
        {
            "config": config.model_dump(mode="json", exclude={"resume_from_checkpoint", "checkpointing_steps"}),
            "pairs": sha256_file(layout.pairs / "pairs.parquet"),
            "media": sha256_file(layout.media / INDEX),
            "encoder": encoder.describe(),
            "recipe": recipe.describe(),
            "program": {f"{path.parent.name}/{path.name}": sha256_file(path) for path in source_files(recipe)},
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "hardware": [setup.accelerator, setup.precision, setup.processes],
        }
    )


def source_files(recipe: Recipe) -> list[Path]:
    """Files that the stage and the recipe import; tracking is left out, because it does not change the result."""
    module, skip = type(recipe).__module__, ("pipeline_steps.tracking",)
    if module.startswith(f"{PACKAGE}."):
        return imported_files(__name__, module, skip=skip)
    folder = Path(inspect.getfile(type(recipe))).parent  # a recipe of another package
    return [*imported_files(__name__, skip=skip), *sorted(folder.rglob("*.py"))]


def read_pairs(layout: ProjectPaths) -> Pairs:
    """Pairs of the splits `train` and `val`.

    Raises:
        DataError: the table is missing or not valid, or split `train` has no pair.
    """
    path = layout.pairs / "pairs.parquet"
    rows = read_table(path, PAIRS).select(PAIR_COLUMNS).to_pylist()
    pairs = {split: [row for row in rows if row["split"] == split] for split in SPLITS}
    if not pairs["train"]:
        raise DataError(f"{path}: split 'train' has no pair", "run dvc repro pair with more data")
    return pairs


def _load_inputs(
    config: TrainConfig,
    layout: ProjectPaths,
    encoder: AudioTokenizer,
    pairs: Pairs,
    digest: str,
    report: StageReport,
) -> TrainingInputs:
    """Audio tokens of all clips, from the feature store where possible, and readers for the rest."""
    media: Any = MediaShardReader(layout.media)
    if config.scenes.fraction:
        catalog = read_table(layout.catalog / "audio.parquet", AUDIO).select(["audio_id", "lufs"]).to_pylist()
        loudness = {row["audio_id"]: row["lufs"] for row in catalog}
        rows, scenes = compose_scenes(pairs["train"], loudness, config.scenes, config.seed)
        pairs = {**pairs, "train": [*pairs["train"], *rows]}
        media = SceneReader(media.image, media.sound, scenes, config.resolution)

    def open_store(mark: str, columns: Sequence[str]) -> FeatureStore:
        return FeatureStore(layout.result_cache / "train" / mark, columns)

    store = open_store(cache_fingerprint(config.audio, config.seed, encoder), TOKEN_COLUMNS)
    rows = [row for split in SPLITS for row in pairs[split]]
    features, report.cache_misses, report.cache_hits = load_or_encode_clips(
        config.audio, config.seed, encoder, store, media.sound, rows
    )
    return TrainingInputs(digest, pairs, features, encoder, media.image, open_store)


def _choose_microbatches(config: TrainConfig, record: Path, prepared: TrainingRun, setup: DistributedSetup) -> None:
    """Divide the steps as recorded for the run, or as found by trying; other processes and resume use the record."""
    datamodule = prepared.datamodule
    if record.is_file():
        count = int(json.loads(record.read_text(encoding="utf-8"))["accumulate_grad_batches"])
    else:
        count = find_microbatches(prepared.module, datamodule, setup, config.recipe_config.phase.batch_size)
        write_json(record, {"accumulate_grad_batches": count})
        log.info("%d microbatches per optimizer step and process", count)
    datamodule.partition = replace(datamodule.partition, accumulate=count)


def _train(config: TrainConfig, folder: Path, prepared: TrainingRun, logger: TrackingLogger, setup: DistributedSetup) -> None:
    """Train from the start or from the last checkpoint. Afterwards the module has the averaged weights."""
    module, datamodule, max_steps = prepared.module, prepared.datamodule, config.recipe_config.phase.max_steps
    last = folder / f"{CHECKPOINT}.ckpt"
    resume, checkpoint = _checkpoint_to_resume(config.resume_from_checkpoint, last, module)
    step = int(checkpoint.get("global_step", 0))
    if resume is not None:
        module.on_load_checkpoint(checkpoint)
        if step >= max_steps:  # the previous attempt ended between the last step and the export
            module.load_state_dict(checkpoint["state_dict"])
            return
        # Positions in the checkpoint count microbatches. It may come from another folder, with another number found.
        recorded = checkpoint.get("accumulate_grad_batches", datamodule.partition.accumulate)
        datamodule.partition = replace(datamodule.partition, accumulate=recorded)
        if setup.is_first:
            print(f"train: resuming from step {step} of {max_steps}", flush=True)
    accumulate = datamodule.partition.accumulate
    identity = f"run {module.digest} from step {step} in {accumulate} microbatches"
    torch.manual_seed(config.seed)
    if setup.compile:
        module.unet.compile(backend=inductor_or_eager)
        module.compiled = True

    def save_grid(step: int, grid: ByteArray) -> None:
        write_bytes(folder / "samples" / f"step-{step:06d}.png", encode_png(grid))

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its hardware report and tips
    trainer = pl.Trainer(
        **setup.trainer_arguments,
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        val_check_interval=config.validation_steps * accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=LOG_EVERY_N_STEPS,
        callbacks=[
            EMACallback(config.optimizer.ema_decay),
            LambdaCallback(on_fit_start=lambda trainer, _: verify_ranks_agree(trainer, setup, identity)),
            SampleGridCallback(prepared.sample_grid, save_grid),
            ThroughputCallback(),
            ProgressCallback(),
            StepCheckpoint(
                config.validation_steps,
                dirpath=folder,
                filename=CHECKPOINT,
                every_n_train_steps=config.checkpointing_steps,
            ),
        ],
        plugins=[AtomicCheckpointIO()],
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    module.train()  # the pipeline of the sample grid has put its parts into evaluation mode
    try:
        with warnings.catch_warnings(), gpu_memory_guard(MEMORY_KEYS, MORE_MEMORY):
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*Checkpoint directory.*")
            warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
            trainer.fit(module, datamodule=datamodule, ckpt_path=resume and str(resume), weights_only=True)
    except NonFiniteLossError as error:
        error.details["last_good_checkpoint"] = f"{CHECKPOINT}.ckpt" if last.is_file() else "none"
        write_json(folder / DIAGNOSIS, {"reason": error.reason, **error.details})
        raise NonFiniteLossError(
            f"{error.reason}; diagnosis: {folder / DIAGNOSIS}", error.action, details=error.details
        ) from error
    except BaseException as error:
        kill_child_processes(trainer)
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None  # Lightning replaces Ctrl-C by SystemExit(1)
        raise
    trainer.save_checkpoint(last, weights_only=True)
    module.to("cpu")


def _checkpoint_to_resume(requested: str | None, last: Path, module: DiffusionModule) -> tuple[Path | None, dict[str, Any]]:
    """Checkpoint to resume from and its contents: the requested one or the run's own, whichever has more steps.

    Raises:
        ConfigError: the requested checkpoint does not exist.
        IntegrityError: one of them belongs to another run.
    """
    paths = [last] if last.is_file() else []
    if requested is not None:
        if not Path(requested).is_file():
            raise ConfigError(
                f"train.resume_from_checkpoint: {requested} does not exist", "set it to a checkpoint of this run, or null"
            )
        paths.append(Path(requested))
    found: tuple[Path | None, dict[str, Any]] = None, {}
    for path in paths:
        checkpoint = read_checkpoint(path)
        module.on_load_checkpoint(checkpoint)
        if found[0] is None or int(checkpoint.get("global_step", 0)) > int(found[1].get("global_step", 0)):
            found = path, checkpoint
    return found


def _export(layout: ProjectPaths, folder: Path, prepared: TrainingRun) -> None:
    """Write the model into the run's folder, then move it to its place as a whole."""
    export = folder / "export"
    shutil.rmtree(export, ignore_errors=True)
    prepared.export(export)
    module, record = prepared.module, export / "training"
    write_text(record / "loss.csv", loss_csv(module.history))
    write_text(record / "validation.csv", validation_csv(module.validation))
    for step in sorted(module.validation, key=int):
        grid = folder / "samples" / f"step-{int(step):06d}.png"
        if grid.is_file():  # grids generated on another machine are missing
            write_bytes(record / grid.name, grid.read_bytes())
    write_checksums("train", export)
    target = layout.model
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    export.replace(target)
