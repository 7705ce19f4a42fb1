"""Stage `train`: pairs -> an audio-conditioned latent diffusion model. The only file of the package that touches the disk."""

from __future__ import annotations

import io
import logging
import math
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
from PIL import Image

from pipeline_steps import tracking
from pipeline_steps.audio.mixing import mix_tracks
from pipeline_steps.audio.reverberation import ROOMS_VERSION, room_impulses
from pipeline_steps.core.atomic import write_bytes, write_json, write_text
from pipeline_steps.core.contracts import PAIRS
from pipeline_steps.core.errors import ConfigError, DataError, ResourceError
from pipeline_steps.core.identity import fingerprint, sha256_file
from pipeline_steps.core.layout import Layout
from pipeline_steps.core.media import INDEX, MediaReader
from pipeline_steps.core.memo import Memo
from pipeline_steps.core.report import StageReport
from pipeline_steps.core.seeding import generator
from pipeline_steps.core.tables import read_table
from pipeline_steps.diffusion.codec import Codec, psnr
from pipeline_steps.diffusion.features import (
    FEATURES_VERSION,
    SoundFeatures,
    prepare_waveform,
    sound_features,
)
from pipeline_steps.diffusion.pictures import square_picture, to_tensor
from pipeline_steps.diffusion.pipeline import Audio2ImagePipeline, DrawingDefaults
from pipeline_steps.diffusion.storage import (
    AtomicCheckpointIO,
    load_weights,
    new_scheduler,
    read_checkpoint,
    save_model,
    save_weights,
)
from pipeline_steps.encoders.yamnet import SAMPLE_RATE, YamNet
from pipeline_steps.train.augment import AUGMENT_VERSION, ROOMS, sound_view
from pipeline_steps.train.batches import BatchStream, PairedData, token_variants, validation_batch
from pipeline_steps.train.callbacks import AveragedWeights, Metrics, Progress, Samples, Tracker
from pipeline_steps.train.codec_training import new_codec, train_codec
from pipeline_steps.train.compiling import Compilation
from pipeline_steps.train.config import Config
from pipeline_steps.train.hardware import Hardware, agree, end_children, plan, prepare
from pipeline_steps.train.loading import Ahead, Waiting
from pipeline_steps.train.module import BUCKETS, DiffusionTraining, NotFiniteError, fit_prior, new_conditioner, new_denoiser
from pipeline_steps.train.sharding import cut, gather
from pipeline_steps.train.sounds import (
    FEATURES_SCHEMA,
    Tracks,
    companion,
    distinct_sounds,
    features_of,
    features_row,
    tracks_of,
)

__all__ = ["Config", "run"]

log = logging.getLogger(__name__)

CHECKPOINT = "last"
DIAGNOSIS = "not-finite.json"
GRID_SOUNDS = 8
GRID_SAMPLES = 2
LOG_EVERY = 10
SPLITS = ("train", "val")


def run(config: Config, layout: Layout) -> StageReport:
    """Train on the pairs of split `train`, look at split `val`, never read split `test`; export averaged weights.

    Raises:
        ConfigError: `resume_from` names no file.
        DataError: no training pairs, or a loss that is not finite again and again.
        ResourceError: a GPU is asked for and there is none.
        IntegrityError: a checkpoint of another run or not a plain checkpoint.
    """
    report = StageReport("train")
    hardware = plan(config, *choose_device(config))
    if config.threads:
        torch.set_num_threads(config.threads)
    rows = read_table(layout.pairs / "pairs.parquet", PAIRS).to_pylist()
    by_split = {split: [row for row in rows if row["split"] == split] for split in SPLITS}
    if not by_split["train"]:
        raise DataError(f"{layout.pairs / 'pairs.parquet'} has no pair of split 'train'", "dvc repro pair, with more data")
    used = by_split["train"] + by_split["val"]
    report.n_in = report.n_ok = len(used)
    digest = run_digest(config, layout)
    folder = layout.runs / "train" / digest
    tracked = tracking.run("train", layout, config, inputs=[layout.pairs, layout.media], resume_key=digest)
    turn = FileLock(folder / "prepare.lock")  # several processes: the first computes, the others find it remembered
    if hardware.processes > 1:
        turn.acquire()
    with tracked if hardware.first else nullcontext(tracking.NullTracker()) as tracker:
        encoder = YamNet(layout.assets).load()
        media = MediaReader(layout.media)
        views = _heard(config, layout, encoder, media, used, report)
        conditioner = _seeded_conditioner(config)
        heard = [views[tracks] for tracks in distinct_sounds(by_split["train"])]
        conditioner.fit([view for sound in heard for view in sound])
        conditioner.remember([sound[0] for sound in heard])
        data = {split: _paired(by_split[split], media, views, conditioner, config.picture_size) for split in SPLITS}
        codec = _codec(config, folder, data["train"].pictures)
        codec_psnr = {split: _codec_psnr(codec, data[split].pictures) for split in SPLITS}
        turn.release()
        denoiser = new_denoiser(config, conditioner)
        fit_prior(denoiser.prior, codec, data["train"].pictures, config.picture, config.seed)
        module = DiffusionTraining(config, denoiser, digest)
        _fit(config, layout, folder, module, codec, data, tracker, hardware)
        if not hardware.first:
            raise SystemExit(0)  # process 0 exports and reports
        _export(config, layout, folder, module, codec)
        report.metrics |= _metrics(module, codec_psnr, data)
        final = {f"train/final/{name}": value for name, value in report.metrics.items()}
        tracker.log_metrics(final, step=config.optimiser.max_steps)
        tracker.log_model(layout.model)
    # The model is whole: what was needed to resume it is not needed any more, and is large.
    (folder / f"{CHECKPOINT}.ckpt").unlink(missing_ok=True)
    return report


def choose_device(config: Config) -> tuple[str, str]:
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


def run_digest(config: Config, layout: Layout) -> str:
    """Identity of a run: parameters, data, encoder, program and torch. A checkpoint serves only the run that wrote it."""
    package = Path(__file__).resolve().parents[1]
    sources = [path for name in ("audio", "diffusion", "encoders", "train") for path in sorted((package / name).rglob("*.py"))]
    return fingerprint(
        {
            "config": config.model_dump(mode="json", exclude={"resume_from", "checkpoint_every"}),
            "pairs": sha256_file(layout.pairs / "pairs.parquet"),
            "media": sha256_file(layout.media / INDEX),
            "encoder": YamNet(layout.assets).describe(),
            "program": {f"{path.parent.name}/{path.name}": sha256_file(path) for path in sources},
            "torch": torch.__version__,
            "threads": config.threads or torch.get_num_threads(),
        }
    )


def _heard(
    config: Config, layout: Layout, encoder: YamNet, media: MediaReader, rows: list[dict[str, Any]], report: StageReport
) -> dict[Tracks, list[SoundFeatures]]:
    """Features of every sound's views, the first being the sound itself; remembered by sound and view."""
    part = config.sound
    mark = fingerprint(
        {
            "encoder": encoder.describe(),
            "features": FEATURES_VERSION,
            "augment": AUGMENT_VERSION,
            "seed": config.seed,
            "sound": part.identity(),
            **({"rooms": ROOMS_VERSION} if part.reverb_share else {}),
        }
    )
    memo = Memo(str(layout.memo), "train", mark, FEATURES_SCHEMA)
    rooms = room_impulses(ROOMS, SAMPLE_RATE, config.seed) if part.reverb_share else []
    waveforms: dict[Tracks, Any] = {}

    def waveform(tracks: Tracks) -> Any:
        if tracks not in waveforms:
            samples = mix_tracks([(media.sound(audio_id), gain_db) for audio_id, gain_db in tracks])
            waveforms[tracks] = prepare_waveform(samples, part.max_seconds)
        return waveforms[tracks]

    sounds = distinct_sounds(rows)
    background = distinct_sounds(row for row in rows if row["split"] == "train")
    views = [(tracks, view, companion(tracks, view, background)) for tracks in sounds for view in range(part.views)]
    keys = {(tracks, view): fingerprint([tracks, view, other]) for tracks, view, other in views}
    known = memo.load(keys.values())
    report.reused = len(known)
    report.computed = len(views) - len(known)
    fresh: dict[str, dict[str, Any]] = {}
    for tracks, view, other in views:
        key = keys[tracks, view]
        if key in known:
            continue
        samples = waveform(tracks)
        if view:
            rng = generator(config.seed, "view", key)
            samples = sound_view(samples, waveform(other) if other else None, part, rng, rooms)
        features = sound_features(encoder, samples)
        fresh[key] = known[key] = features_row(features)
        if len(fresh) >= 256:
            memo.append(fresh)
            fresh = {}
    memo.append(fresh)
    return {tracks: [features_of(known[keys[tracks, view]]) for view in range(part.views)] for tracks in sounds}


def _seeded_conditioner(config: Config) -> Any:
    torch.manual_seed(config.seed)
    return new_conditioner(config)


def _paired(
    rows: list[dict[str, Any]], media: MediaReader, views: dict[Tracks, list[SoundFeatures]], conditioner: Any, size: int
) -> PairedData:
    sounds = distinct_sounds(rows)
    number = {tracks: index for index, tracks in enumerate(sounds)}
    pictures = [square_picture(media.image(row["image_id"]), size) for row in rows]
    stacked = np.stack(pictures) if pictures else np.zeros((0, size, size, 3), np.uint8)
    return PairedData(
        pictures=to_tensor(stacked),
        sounds=[number[tracks_of(row)] for row in rows],
        tokens=[token_variants(conditioner, views[tracks]) for tracks in sounds],
    )


def _codec(config: Config, folder: Path, pictures: torch.Tensor) -> Codec:
    """The run's codec: trained, or taken from the run's folder if an earlier try got that far."""
    path = folder / "codec.safetensors"
    if path.is_file():
        codec = new_codec(config.codec)
        load_weights(path, codec)
        return codec.requires_grad_(False).eval()

    def progress(step: int, loss: float) -> None:
        if step % 100 == 0 or step == config.codec.steps:
            print(f"train: codec step {step}/{config.codec.steps}  loss {loss:.4f}", flush=True)

    codec = train_codec(pictures, config.codec, config.seed, progress)
    save_weights(path, codec)
    return codec


@torch.inference_mode()
def _codec_psnr(codec: Codec, pictures: torch.Tensor) -> float | None:
    if not len(pictures):
        return None
    decoded = torch.cat([codec.decode(codec.encode(batch)) for batch in torch.split(pictures, 64)])
    return round(psnr(decoded, pictures), 3)


def _fit(
    config: Config,
    layout: Layout,
    folder: Path,
    module: DiffusionTraining,
    codec: Codec,
    data: dict[str, PairedData],
    tracker: Tracker,
    hardware: Hardware,
) -> None:
    """Train from the start or from the run's last checkpoint; afterwards the module holds the averaged weights."""
    part = config.optimiser
    last = folder / f"{CHECKPOINT}.ckpt"
    resume = _checkpoint_to_resume(config, last)
    first = 0
    if resume is not None:
        checkpoint = read_checkpoint(resume)
        module.on_load_checkpoint(checkpoint)
        first = len(module.history)
        if int(checkpoint.get("global_step", 0)) >= part.max_steps:  # killed between the last step and the export
            module.load_state_dict(checkpoint["state_dict"])
            return
        if hardware.first:
            print(f"train: going on from step {checkpoint.get('global_step')} of {part.max_steps}", flush=True)
    torch.manual_seed(config.seed)
    averages = AveragedWeights(part.ema_decay)
    stream = BatchStream(data["train"], codec, config, first, hardware.share)
    prepare(module.unet, config, hardware)
    if hardware.strategy == "fsdp":
        module.mesh_blocks = cut
    shown = data["val"] if len(data["val"]) else data["train"]
    scheduler = new_scheduler(config.drawing.shift)
    pipeline = Audio2ImagePipeline(module.denoiser, codec, scheduler, None, _defaults(config))
    chosen = list(range(min(GRID_SOUNDS, len(shown))))
    tokens = [shown.clean_tokens([row]) for row in chosen]

    def draw() -> np.ndarray[Any, Any]:
        pictures = pipeline.draw_many(tokens, GRID_SAMPLES, seed=config.seed)
        return np.concatenate([np.concatenate(list(column), axis=0) for column in pictures], axis=1)

    def keep(step: int, grid: np.ndarray[Any, Any]) -> None:
        write_bytes(folder / "samples" / f"step-{step:06d}.png", _png(grid))

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its hardware report and tips
    held_out = validation_batch(data["val"], codec, config.seed)
    device = hardware.device
    loader = Waiting(Ahead(stream, config.speed.ahead, device) if device.type == "cuda" else stream, device)
    trainer = pl.Trainer(
        **hardware.trainer_arguments(),
        max_steps=part.max_steps,
        max_epochs=-1,
        callbacks=[
            averages,
            LambdaCallback(on_fit_start=lambda trainer, _: agree(trainer, hardware, f"run {module.digest} from step {first}")),
            Compilation(
                config.speed.compile, lambda: stream.batch(part.compose.steps), part.refine.steps * config.speed.accumulate
            ),
            Samples(config.sample_every, averages, draw, keep, held_out, tracker),
            Metrics(LOG_EVERY, tracker, loader.waited),
            Progress(),
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
    except NotFiniteError as error:
        error.details["last_good_checkpoint"] = f"{CHECKPOINT}.ckpt" if last.is_file() else "none"
        write_json(folder / DIAGNOSIS, {"reason": error.reason, **error.details})
        raise NotFiniteError(f"{error.reason}; diagnosis: {folder / DIAGNOSIS}", error.action, details=error.details) from error
    except BaseException:
        end_children(trainer)
        raise
    trainer.save_checkpoint(last, weights_only=True)
    if hardware.strategy == "fsdp":
        gather(module)
    module.to("cpu")


def _checkpoint_to_resume(config: Config, last: Path) -> Path | None:
    """The checkpoint to go on from: the one asked for, else the run's own.

    Raises:
        ConfigError: the one asked for is missing. Never a silent fresh start.
    """
    if config.resume_from is not None:
        path = Path(config.resume_from)
        if not path.is_file():
            raise ConfigError(f"train.resume_from: {path} does not exist", "give a checkpoint of this run, or null")
        return path
    return last if last.is_file() else None


def _defaults(config: Config) -> DrawingDefaults:
    return DrawingDefaults(
        steps=config.drawing.steps,
        guidance_scale=config.drawing.guidance_scale,
        max_seconds=config.sound.max_seconds,
        picture_size=config.picture_size,
    )


def _export(config: Config, layout: Layout, folder: Path, module: DiffusionTraining, codec: Codec) -> None:
    """Write the model beside its place, then put it there whole."""
    scratch = folder / "export"
    shutil.rmtree(scratch, ignore_errors=True)
    defaults = _defaults(config)
    values = {name: getattr(defaults, name) for name in ("steps", "guidance_scale", "max_seconds", "picture_size")}
    save_model(scratch, module.denoiser, codec, new_scheduler(config.drawing.shift), values, layout.assets)
    _write_training(scratch / "training", folder, module)
    target = layout.model
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    scratch.replace(target)


def _write_training(target: Path, folder: Path, module: DiffusionTraining) -> None:
    """How it went: loss.csv by step, validation.csv, and the sample grids."""
    names = ["loss", *(f"loss_t{index}" for index in range(BUCKETS))]
    lines = [",".join(["step", *names])]
    for number, row in enumerate(module.history, start=1):
        lines.append(",".join([str(number), *(_number(row[name]) for name in names)]))
    write_text(target / "loss.csv", "\n".join(lines) + "\n")
    rows = [f"{step},{_number(value)}" for step, value in sorted(module.validation.items(), key=lambda item: int(item[0]))]
    write_text(target / "validation.csv", "\n".join(["step,validation_loss", *rows]) + "\n")
    for step in sorted(module.validation, key=int):
        name = f"step-{int(step):06d}.png"
        write_bytes(target / name, (folder / "samples" / name).read_bytes())


def _number(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else ""


def _png(picture: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def _metrics(module: DiffusionTraining, codec_psnr: dict[str, float | None], data: dict[str, PairedData]) -> dict[str, Any]:
    tail = [row["loss"] for row in module.history[-100:] if math.isfinite(row["loss"])]
    validation = [
        value for _, value in sorted(module.validation.items(), key=lambda item: int(item[0])) if math.isfinite(value)
    ]
    values: dict[str, Any] = {
        "steps": len(module.history),
        "loss": round(float(np.mean(tail)), 6) if tail else None,
        "validation_loss": round(validation[-1], 6) if validation else None,
        "codec_psnr_train_db": codec_psnr["train"],
        "codec_psnr_val_db": codec_psnr["val"],
        "parameters": sum(parameter.numel() for parameter in module.denoiser.parameters()),
        "pairs_train": len(data["train"]),
        "pairs_val": len(data["val"]),
        "sounds_train": len(data["train"].tokens),
    }
    return {key: value for key, value in values.items() if value is not None} | module.speed
