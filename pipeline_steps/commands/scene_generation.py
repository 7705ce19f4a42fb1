"""Generation of images from audio scenes by an exported model, chosen by folder or by version of the registry."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline_steps.core.array_types import ByteArray, FloatArray
from pipeline_steps.core.errors import ConfigError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.diffusion.pipelines.base import AudioConditionedPipeline
from pipeline_steps.diffusion.pipelines.ip_adapter import MODELS_VARIABLE

MAX_TEXT_LENGTH = 300
"""Characters of a text beside the audio."""


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """Sampling parameters of a scene.

    Attributes:
        num_samples: images of each scene.
        seed: of the initial noise.
        guidance_scale: None selects the model's default.
        num_inference_steps: None selects the model's default.
        text: text beside the audio; None: the audio alone.
        audio_scale: weight of the audio beside a text, 0: the text alone, 1: the audio alone.
    """

    num_samples: int = 4
    seed: int = 0
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    text: str | None = None
    audio_scale: float = 0.5


def model_folder(layout: ProjectPaths, model: str | None) -> Path:
    """Exported folder of a model: `model` is a folder, or a version, alias or run of the registry; None: the project's model.

    A version that differs from the project's model is downloaded once, to `.runs/models`.

    Raises:
        ConfigError: the project has no model, or no registry.
        DataError: no version matches, or MLflow does not have the model any more.
        IntegrityError: the downloaded model differs from the version.
        ServiceError: the registry does not answer.
    """
    if model is None:
        if not layout.model.is_dir():
            raise ConfigError(f"{layout.model}: there is no trained model", "sonify run train")
        return layout.model
    if Path(model).is_dir():
        return Path(model)

    from pipeline_steps.tracking.lineage.dvc_digests import hash_path
    from pipeline_steps.tracking.registry.model_comparison import fetch_model
    from pipeline_steps.tracking.registry.model_registry import ModelRegistry

    info = ModelRegistry(layout).resolve(model)
    os.environ.setdefault(MODELS_VARIABLE, str(layout.root.resolve()))  # the export names folders of the project
    kept = layout.runs / "models" / info.md5
    for folder in (layout.model, kept):
        if folder.is_dir() and hash_path(folder) == info.md5:
            return folder
    download = kept.with_suffix(".download")
    for folder in (kept, download):
        shutil.rmtree(folder, ignore_errors=True)
    download.mkdir(parents=True)
    try:
        fetch_model(layout, info, download).rename(kept)
    finally:
        shutil.rmtree(download, ignore_errors=True)
    return kept


def generate_images(
    pipeline: AudioConditionedPipeline,
    waveforms: Sequence[FloatArray],
    settings: GenerationSettings,
    tracks: Sequence[Sequence[FloatArray]] = (),
) -> ByteArray:
    """Images uint8 [N, num_samples, H, W, 3] from N clips [T] at 48 kHz. Image k of every clip has the same initial noise.

    Args:
        tracks: sounds of each clip at their gains, if they are known (`AudioScene.tracks`).

    Raises:
        ConfigError: a text is given that is empty or too long, or the model has no text encoder.
    """
    text = settings.text
    if text is not None and not 0 < len(text.strip()) <= MAX_TEXT_LENGTH:
        raise ConfigError(f"the text beside the audio has {len(text)} characters", f"write 1 to {MAX_TEXT_LENGTH} of them")
    if text is not None and not pipeline.has_text_encoder:
        raise ConfigError("this model has no text encoder, so it takes no text beside the audio", "leave the text out")
    known = tracks or [()] * len(waveforms)
    embeds = [
        pipeline.encode_mixture(waveform, parts) if len(parts) > 1 else pipeline.encode_audio(waveform)
        for waveform, parts in zip(waveforms, known, strict=True)
    ]
    sampling = (settings.num_samples, settings.seed, settings.guidance_scale, settings.num_inference_steps)
    if text is None:
        return pipeline.generate_batch(embeds, *sampling)
    return pipeline.generate_from_audio_and_text(embeds, text.strip(), settings.audio_scale, *sampling)
