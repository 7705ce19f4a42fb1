"""Stage `train`: pairs -> an audio-conditioned latent diffusion model. The only file of the package that touches the disk."""

from __future__ import annotations

import logging
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from filelock import FileLock
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint

from pipeline_steps import tracking
from pipeline_steps.core.atomic import write_bytes, write_json, write_text
from pipeline_steps.core.errors import ConfigError, DataError, ResourceError
from pipeline_steps.core.hashing import fingerprint, sha256_file
from pipeline_steps.core.media_shards import INDEX, MediaShardReader
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.result_cache import ResultCache
from pipeline_steps.core.schemas import PAIRS
from pipeline_steps.core.stage_report import StageReport
from pipeline_steps.core.tables import read_table
from pipeline_steps.diffusion.audio_tokens import AstTokenizer, GridEncoder, YamnetTokenizer
from pipeline_steps.diffusion.autoencoder import Codec
from pipeline_steps.diffusion.pipelines.safetensors_io import AtomicCheckpointIO, load_weights, read_checkpoint, save_weights
from pipeline_steps.diffusion.stable_diffusion import StableDiffusionBackbone
from pipeline_steps.models.audio.ast import AstEncoder
from pipeline_steps.models.audio.yamnet import YamNet
from pipeline_steps.train.audio_feature_cache import (
    cache_fingerprint,
    distinct_sounds,
    feature_spec_for,
    load_or_extract_features,
)
from pipeline_steps.train.autoencoder_training import build_autoencoder, train_codec
from pipeline_steps.train.callbacks import EMACallback, MetricLogger, MetricsCallback, ProgressCallback, SampleGridCallback
from pipeline_steps.train.compile_probe import CompileProbe
from pipeline_steps.train.config import TrainConfig
from pipeline_steps.train.distributed import (
    DistributedSetup,
    apply_memory_settings,
    kill_child_processes,
    resolve_distributed_setup,
    verify_ranks_agree,
)
from pipeline_steps.train.fsdp import shard_model, unshard_model
from pipeline_steps.train.history import final_metrics, loss_csv, png, validation_table
from pipeline_steps.train.lightning_module import DiffusionModule, NonFiniteLossError
from pipeline_steps.train.prefetch import Prefetcher, TimedLoader
from pipeline_steps.train.recipes.base import Recipe, Split, build_adapter_recipe, build_scratch_recipe
from pipeline_steps.train.recipes.ip_adapter import LATENTS_SCHEMA, latents_fingerprint

__all__ = ["TrainConfig", "run"]

log = logging.getLogger(__name__)

CHECKPOINT = "last"
DIAGNOSIS = "not-finite.json"
LOG_EVERY = 10
SPLITS = ("train", "val")
Frozen = tuple[GridEncoder, StableDiffusionBackbone | None]
"""What hears, and the backbone of recipe `adapter`."""


def run(config: TrainConfig, layout: ProjectPaths) -> StageReport:
    """Train on the pairs of split `train`, look at split `val`, never read split `test`; export averaged weights.

    Raises:
        ConfigError: `resume_from` names no file.
        DataError: no training pairs, one sound for all of them, or a loss that is not finite again and again.
        ResourceError: a GPU is asked for and there is none.
        IntegrityError: a checkpoint of another run or not a plain checkpoint.
    """
    report = StageReport("train")
    hardware = resolve_distributed_setup(config, *resolve_accelerator(config))
    if config.threads:
        torch.set_num_threads(config.threads)
    rows = read_table(layout.pairs / "pairs.parquet", PAIRS).to_pylist()
    by_split = {split: [row for row in rows if row["split"] == split] for split in SPLITS}
    if not by_split["train"]:
        raise DataError(f"{layout.pairs / 'pairs.parquet'} has no pair of split 'train'", "dvc repro pair, with more data")
    if config.recipe == "scratch" and len(distinct_sounds(by_split["train"])) < 2:
        raise DataError(
            f"{layout.pairs / 'pairs.parquet'}: all pairs of split 'train' have one sound, so none shows what a sound changes",
            "give ingest more sounds and run dvc repro",
        )
    used = by_split["train"] + by_split["val"]
    report.n_in = report.n_ok = len(used)
    frozen = _build_frozen_models(config, layout, hardware.accelerator, hardware.precision)
    digest = run_digest(config, layout, frozen, hardware)
    folder = layout.runs / "train" / digest
    tracked = tracking.run("train", layout, config, inputs=[layout.pairs, layout.media], resume_key=digest)
    turn = FileLock(folder / "prepare.lock")  # several processes: the first computes, the others find it remembered
    with tracked if hardware.first else nullcontext(tracking.NoOpTracker()) as tracker:
        with turn if hardware.processes > 1 else nullcontext():
            recipe = _recipe(config, layout, folder, frozen, by_split, digest, hardware.accelerator, report)
        _train(config, folder, recipe, tracker, hardware)
        if not hardware.first:
            raise SystemExit(0)  # process 0 exports and reports
        _export(layout, folder, recipe)
        report.metrics |= final_metrics(recipe.module) | recipe.metrics
        final = {f"train/final/{name}": value for name, value in report.metrics.items()}
        tracker.log_metrics(final, step=config.max_steps)
        tracker.log_model(layout.model)
    # The model is whole: what was needed to resume it is not needed any more, and is large.
    (folder / f"{CHECKPOINT}.ckpt").unlink(missing_ok=True)
    return report


def resolve_accelerator(config: TrainConfig) -> tuple[str, str]:
    """Lightning's accelerator and precision.

    Raises:
        ResourceError: CUDA is asked for and torch sees none.
    """
    present = torch.cuda.is_available()
    if config.device == "cuda" and not present:
        raise ResourceError(
            f"train.device is cuda, but torch {torch.__version__} sees no GPU",
            "set train.device to auto or cpu, or mend the driver",
        )
    cuda = present and config.device != "cpu"
    if config.device == "auto" and not cuda:
        log.info("no GPU: training on the CPU with %d threads", config.threads or torch.get_num_threads())
    precision = config.precision if config.precision != "auto" else ("bf16-mixed" if cuda else "32-true")
    return ("gpu" if cuda else "cpu"), precision


def run_digest(config: TrainConfig, layout: ProjectPaths, frozen: Frozen, hardware: DistributedSetup) -> str:
    """Identity of a run: parameters, data, frozen models, program, torch, and what `auto` found of the hardware.

    A checkpoint serves only the run that wrote it.
    """
    package = Path(__file__).resolve().parents[1]
    sources = [path for name in ("audio", "diffusion", "models", "train") for path in sorted((package / name).rglob("*.py"))]
    encoder, backbone = frozen
    return fingerprint(
        {
            "config": config.model_dump(mode="json", exclude={"resume_from", "checkpoint_every"}),
            "pairs": sha256_file(layout.pairs / "pairs.parquet"),
            "media": sha256_file(layout.media / INDEX),
            "encoder": encoder.describe(),
            "backbone": backbone.describe() if backbone is not None else None,
            "program": {f"{path.parent.name}/{path.name}": sha256_file(path) for path in sources},
            "torch": torch.__version__,
            "threads": config.threads or torch.get_num_threads(),
            "hardware": [hardware.accelerator, hardware.precision, hardware.processes],
        }
    )


def _build_frozen_models(config: TrainConfig, layout: ProjectPaths, accelerator: str, precision: str) -> Frozen:
    """What hears, and the backbone if the recipe has one; weights are not loaded yet."""
    encoder: GridEncoder = YamnetTokenizer(YamNet(layout.assets))
    device = "cuda" if accelerator == "gpu" else "cpu"
    if config.sound.encoder == "ast":
        part = config.sound.ast
        encoder = AstTokenizer(AstEncoder(part.model, part.revision, device, part.precision, root=layout.root))
    if config.recipe == "scratch":
        return encoder, None
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    return encoder, StableDiffusionBackbone(config.backbone.model, config.backbone.revision, dtype, root=layout.root)


def _recipe(
    config: TrainConfig,
    layout: ProjectPaths,
    folder: Path,
    frozen: Frozen,
    by_split: Split,
    digest: str,
    accelerator: str,
    report: StageReport,
) -> Recipe:
    """What the configured recipe trains and trains on. Frozen models see each item once: the memo keeps what comes out."""
    encoder, backbone = frozen
    media = MediaShardReader(layout.media)
    ear = feature_spec_for(encoder, config.sound.max_seconds, grids=backbone is not None)
    memo = ResultCache(str(layout.result_cache), "train", cache_fingerprint(config, ear), ear.schema)
    rows = [row for split in SPLITS for row in by_split[split]]
    views, report.computed, report.reused = load_or_extract_features(config, ear, memo, media.sound, rows)
    if backbone is None:
        return build_scratch_recipe(
            config, by_split, views, media.image, lambda pictures: _codec(config, folder, pictures), layout.assets, digest
        )
    latents = ResultCache(str(layout.result_cache), "train", latents_fingerprint(config, backbone, accelerator), LATENTS_SCHEMA)
    return build_adapter_recipe(config, by_split, views, media.image, encoder, backbone, latents, layout.assets, digest)


def _codec(config: TrainConfig, folder: Path, pictures: torch.Tensor) -> Codec:
    """The run's codec: trained, or taken from the run's folder if an earlier try got that far."""
    path = folder / "codec.safetensors"
    if path.is_file():
        codec = build_autoencoder(config.codec, config.seed)
        load_weights(path, codec)
        return codec.requires_grad_(False).eval()

    def progress(step: int, loss: float) -> None:
        if step % 100 == 0 or step == config.codec.steps:
            print(f"train: codec step {step}/{config.codec.steps}  loss {loss:.4f}", flush=True)

    codec = train_codec(pictures, config.codec, config.seed, progress)
    save_weights(path, codec)
    return codec


def _train(config: TrainConfig, folder: Path, recipe: Recipe, tracker: MetricLogger, hardware: DistributedSetup) -> None:
    """Train from the start or from the run's last checkpoint; afterwards the module holds the averaged weights."""
    module = recipe.module
    last = folder / f"{CHECKPOINT}.ckpt"
    resume, checkpoint = _checkpoint_to_resume(config, last, module)
    first = 0
    if resume is not None:
        module.on_load_checkpoint(checkpoint)
        first = len(module.history)
        if int(checkpoint.get("global_step", 0)) >= config.max_steps:  # killed between the last step and the export
            module.load_state_dict(checkpoint["state_dict"])
            return
        if hardware.first:
            print(f"train: going on from step {checkpoint.get('global_step')} of {config.max_steps}", flush=True)
    torch.manual_seed(config.seed)
    averages = EMACallback(config.optimiser.ema_decay)
    stream = recipe.stream(first, hardware.share)
    apply_memory_settings(module.unet, config, hardware)
    if hardware.strategy == "fsdp":
        module.mesh_blocks = shard_model

    def keep(step: int, grid: np.ndarray[Any, Any]) -> None:
        write_bytes(folder / "samples" / f"step-{step:06d}.png", png(grid))

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its hardware report and tips
    held_out = recipe.held_out()
    device, (begin, steps) = hardware.device, module.unet_steps
    loader = TimedLoader(Prefetcher(stream, config.speed.ahead, device) if device.type == "cuda" else stream, device)
    trainer = pl.Trainer(
        **hardware.trainer_arguments(),
        max_steps=config.max_steps,
        max_epochs=-1,
        callbacks=[
            averages,
            LambdaCallback(
                on_fit_start=lambda trainer, _: verify_ranks_agree(trainer, hardware, f"run {module.digest} from step {first}")
            ),
            CompileProbe(config.speed.compile, lambda: stream.batch(begin), steps * config.speed.accumulate),
            SampleGridCallback(config.sample_every, averages, recipe.draw, keep, held_out, tracker),
            MetricsCallback(LOG_EVERY, tracker, loader.waited),
            ProgressCallback(),
            ModelCheckpoint(
                dirpath=folder,
                filename=CHECKPOINT,
                every_n_train_steps=config.checkpoint_every,
                save_top_k=1,
                enable_version_counter=False,
                save_on_train_epoch_end=False,
            ),
        ],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    module.train()  # the pipeline that draws samples had put its parts into evaluation mode
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*Checkpoint directory.*")
            warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
            warnings.filterwarnings("ignore", message=".*training_step` returned `None`.*")  # counted in `bad_steps`
            trainer.fit(module, loader, ckpt_path=str(resume) if resume is not None else None, weights_only=True)
    except NonFiniteLossError as error:
        error.details["last_good_checkpoint"] = f"{CHECKPOINT}.ckpt" if last.is_file() else "none"
        write_json(folder / DIAGNOSIS, {"reason": error.reason, **error.details})
        raise NonFiniteLossError(
            f"{error.reason}; diagnosis: {folder / DIAGNOSIS}", error.action, details=error.details
        ) from error
    except BaseException as error:
        kill_child_processes(trainer)
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None  # Lightning makes a plain exit 1 of Ctrl-C
        raise
    trainer.save_checkpoint(last, weights_only=True)
    if hardware.strategy == "fsdp":
        unshard_model(module)
    module.to("cpu")


def _checkpoint_to_resume(config: TrainConfig, last: Path, module: DiffusionModule) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint to go on from and what is in it: the one asked for or the run's own, whichever is further on.

    Raises:
        ConfigError: the one asked for is missing. Never a silent fresh start.
        IntegrityError: one belongs to another run, also if the other one is further on.
    """
    paths = [last] if last.is_file() else []
    if config.resume_from is not None:
        asked = Path(config.resume_from)
        if not asked.is_file():
            raise ConfigError(f"train.resume_from: {asked} does not exist", "give a checkpoint of this run, or null")
        paths.append(asked)
    found: tuple[Path | None, dict[str, Any]] = None, {}
    for path in paths:
        checkpoint = read_checkpoint(path)
        module.on_load_checkpoint(checkpoint)
        if found[0] is None or int(checkpoint.get("global_step", 0)) > int(found[1].get("global_step", 0)):
            found = path, checkpoint
    return found


def _export(layout: ProjectPaths, folder: Path, recipe: Recipe) -> None:
    """Write the model beside its place, then put it there whole."""
    scratch = folder / "export"
    shutil.rmtree(scratch, ignore_errors=True)
    recipe.save(scratch)
    module, record = recipe.module, scratch / "training"
    write_text(record / "loss.csv", loss_csv(module.history))
    write_text(record / "validation.csv", validation_table(module.validation))
    for step in sorted(module.validation, key=int):
        grid = folder / "samples" / f"step-{int(step):06d}.png"
        if grid.is_file():  # a checkpoint from elsewhere does not bring the grids that were drawn there
            write_bytes(record / grid.name, grid.read_bytes())
    target = layout.model
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    scratch.replace(target)
