"""Python interface to a project: models, retrieval, embeddings and pairs. `from pipeline_steps import ...` imports it lazily.

All functions work on a project, a folder with `dvc.yaml`: by default the current folder or the nearest above it. They use the
functions of the commands `sonify draw`, `find` and `export`. Files are decoded in child processes with the limits of ingest.
Failures are `pipeline_steps.core.errors.StageError`, with the reason and the next action.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from pipeline_steps.core.array_types import ByteArray, FloatArray
from pipeline_steps.core.errors import ConfigError, DataError
from pipeline_steps.core.media_shards import SAMPLE_RATE, MediaShardReader
from pipeline_steps.core.project_paths import ProjectPaths, find_root

if TYPE_CHECKING:
    import datasets
    import pandas
    import torch
    from PIL.Image import Image

    from pipeline_steps.diffusion.pipelines.base import AudioConditionedPipeline

__all__ = ["Audio2ImagePipeline", "PairDataset", "SoundMatches", "embed_sounds", "find_sounds", "load_pairs"]

FilePath: TypeAlias = str | os.PathLike[str]
Sound: TypeAlias = FilePath | npt.NDArray[Any]
"""Audio file, or samples [T] or [T, channels] as of `soundfile.read`: floats in [-1, 1], or integers of full range."""

MAX_CHANNELS = 32
"""A second axis that is longer is not one of channels."""


class Audio2ImagePipeline:
    """Trained model that generates images from sounds.

    Attributes:
        folder: exported model.
        model: loaded pipeline of the model's recipe, which takes mono 48 kHz samples.
    """

    def __init__(self, folder: Path, model: AudioConditionedPipeline, layout: ProjectPaths) -> None:
        self.folder = folder
        self.model = model
        self._layout = layout

    @classmethod
    def from_pretrained(
        cls, model: FilePath | int | None = None, *, project: FilePath | None = None, device: str | None = None
    ) -> Self:
        """Load a model. Hashes are checked, nothing is unpickled.

        Args:
            model: exported folder, or version (`3`), alias (`champion`) or run of the project's registry; None selects the
                model that the project trained last.
            project: folder of the project; None selects the current one.
            device: `cpu` or `cuda`; None selects a GPU if there is one.

        Raises:
            ConfigError: the project has no model, or no registry.
            DataError: no version matches, or a file is missing.
            IntegrityError: a file differs from what was exported.
            ServiceError: the registry does not answer.
        """
        from pipeline_steps.commands.scene_generation import model_folder
        from pipeline_steps.diffusion.pipelines.auto import AutoAudio2ImagePipeline

        layout = _layout(project)
        folder = model_folder(layout, None if model is None else os.fspath(model) if not isinstance(model, int) else str(model))
        return cls(folder, AutoAudio2ImagePipeline.from_pretrained(folder, device), layout)

    def __call__(
        self,
        sound: Sound,
        sampling_rate: int | None = None,
        *,
        text: str | None = None,
        audio_scale: float | None = None,
        num_samples: int = 1,
        seed: int = 0,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
    ) -> list[Image]:
        """Generate images from a sound. Equal arguments give equal images on one machine.

        Args:
            sound: audio file, or samples, whose level is part of the condition.
            sampling_rate: Hz of an array.
            text: text beside the sound, if the model has a text encoder.
            audio_scale: weight of the sound beside the text, 0: the text alone, 1: the sound alone.
            num_samples: number of images; image k does not depend on it.
            seed: of the initial noise.
            guidance_scale: 1 samples the conditional model, larger values follow the sound more closely; None selects the
                model's default.
            num_inference_steps: steps of the scheduler; None selects the model's default.

        Raises:
            ConfigError: the path is not a file, an array has no sampling rate, or the text cannot be used.
            DataError: the file or the samples are not usable audio.
        """
        from PIL import Image

        from pipeline_steps.commands.scene_generation import GenerationSettings, generate_images

        settings = GenerationSettings(num_samples, seed, guidance_scale, num_inference_steps, text)
        if audio_scale is not None:
            settings = replace(settings, audio_scale=audio_scale)
        waveforms = _waveforms(self._layout, [sound], sampling_rate)
        return [Image.fromarray(pixels) for pixels in generate_images(self.model, waveforms, settings)[0]]


@dataclass(frozen=True, slots=True)
class SoundMatches:
    """Sounds of the pool that fit an image.

    Attributes:
        events: sound events of the image, the most prominent first: phrase, salience, confidence and more.
        audio: best clips, best first: audio_id, path, license, duration_s, score, and the phrase `because` of which.
        reason: code and reason if the pipeline would abstain, so that the events are guesses; else None.
    """

    events: list[dict[str, Any]]
    audio: list[dict[str, Any]]
    reason: str | None
    _media: MediaShardReader

    def waveform(self, index: int = 0) -> FloatArray:
        """Samples of a clip of `audio`: mono float32 [T] at 48 kHz."""
        return self._media.sound(self.audio[index]["audio_id"])


def find_sounds(image: FilePath | ByteArray | Image, *, project: FilePath | None = None) -> SoundMatches:
    """Retrieve the five clips of the pool that fit an image best, as `sonify find` does.

    Args:
        image: image file, RGB uint8 [H, W, 3], or a PIL image.
        project: folder of a project whose stages up to `retrieve` have run; None selects the current one.

    Raises:
        ConfigError: the path is not a file.
        DataError: the image cannot be used, or a stage has not run.
        IntegrityError: a table or the index is damaged.
    """
    from pipeline_steps.commands.draw import load_media
    from pipeline_steps.commands.find import AudioFinder, load_image

    layout = _layout(project)
    if isinstance(image, str | os.PathLike):
        kind, payload = load_media(layout, Path(image))
        if kind != "image":
            raise DataError(f"{os.fspath(image)} is an audio file", "give an image; for audio: Audio2ImagePipeline")
        name, pixels = Path(image).name, load_image(payload)
    else:
        name, pixels = "the image", np.asarray(image if isinstance(image, np.ndarray) else image.convert("RGB"))
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
            raise ConfigError(f"the image is {pixels.dtype} {list(pixels.shape)}", "give RGB uint8 [H, W, 3]")
    found = AudioFinder(layout).find(name, pixels)
    return SoundMatches(found.events, found.clips, found.reason, MediaShardReader(layout.media))


def embed_sounds(
    sounds: Sound | Sequence[Sound], sampling_rate: int | None = None, *, project: FilePath | None = None
) -> FloatArray:
    """Encode sounds with the text-audio encoder of the project.

    Args:
        sounds: audio file or samples, or a sequence of them.
        sampling_rate: Hz of the arrays.
        project: folder of the project, whose section `embed` names the encoder; None selects the current one.

    Returns:
        Unit vectors float32 [N, D]; the inner product of two rows is the similarity of the sounds.

    Raises:
        ConfigError: a path is not a file, or an array has no sampling rate.
        DataError: a sound is not usable, or the weights are missing.
    """
    from pipeline_steps.core.config import load_params, parse_section
    from pipeline_steps.embed.stage import EmbedConfig, embed_audio

    layout = _layout(project)
    given = [sounds] if isinstance(sounds, str | os.PathLike | np.ndarray) else list(sounds)
    config = parse_section(EmbedConfig, "embed", load_params(layout.params))
    return embed_audio(config, layout, _waveforms(layout, given, sampling_rate))


def load_pairs(split: str | None = None, *, project: FilePath | None = None) -> PairDataset:
    """Load the pairs of a project.

    Args:
        split: `train`, `val` or `test`; None selects all.
        project: folder of a project whose stages up to `pair` have run; None selects the current one.

    Raises:
        ConfigError: there is no such split.
        DataError: a stage has not run.
    """
    from pipeline_steps.core.errors import suggest_name
    from pipeline_steps.core.schemas import PAIRS
    from pipeline_steps.core.tables import read_table
    from pipeline_steps.pair.splits import SPLITS

    layout = _layout(project)
    if split is not None and split not in SPLITS:
        raise ConfigError(f"there is no split {split!r}", suggest_name(split, SPLITS))
    rows = read_table(layout.pairs / "pairs.parquet", PAIRS).to_pylist()
    return PairDataset(layout, [row for row in rows if split is None or row["split"] == split])


class PairDataset(Sequence[dict[str, Any]]):
    """Pairs of an image and its audio: a sequence, and so a map-style data set. A slice is a data set too.

    An item has `image` (RGB uint8 [H, W, 3]), `audio` (float32 [T] at 48 kHz, the tracks mixed with their gains),
    `sampling_rate`, `phrase`, `pair_id` and `split`. Media are read when an item is read.
    """

    def __init__(self, layout: ProjectPaths, rows: Sequence[dict[str, Any]]) -> None:
        self._layout = layout
        self._media = MediaShardReader(layout.media)
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> PairDataset: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | PairDataset:
        from pipeline_steps.audio.mixing import mix_tracks

        if isinstance(index, slice):
            return PairDataset(self._layout, self.rows[index])
        row = self.rows[index]
        tracks = [(self._media.sound(track["audio_id"]), track["gain_db"]) for track in row["tracks"]]
        return {
            "image": self._media.image(row["image_id"]),
            "audio": mix_tracks(tracks),
            "sampling_rate": SAMPLE_RATE,
            "phrase": row["tracks"][0]["phrase"],
            "pair_id": row["pair_id"],
            "split": row["split"],
        }

    def to_pandas(self) -> pandas.DataFrame:
        """Data frame with the columns of `pairs.parquet`, and the first track as `audio_id`, `phrase` and `gain_db`.

        `image_path` and `audio_path` are relative to the root of the pool.
        """
        import pandas as pd

        from pipeline_steps.core.schemas import AUDIO, IMAGES, PAIRS
        from pipeline_steps.core.tables import read_table

        frame = pd.DataFrame(self.rows, columns=PAIRS.schema.names)
        for name in ("audio_id", "phrase", "gain_db"):
            frame[name] = [row["tracks"][0][name] for row in self.rows]
        for kind, schema in (("image", IMAGES), ("audio", AUDIO)):
            name = "images" if kind == "image" else "audio"
            catalog = read_table(self._layout.catalog / f"{name}.parquet", schema)
            paths = dict(zip(catalog[f"{kind}_id"].to_pylist(), catalog["path"].to_pylist(), strict=True))
            frame[f"{kind}_path"] = frame[f"{kind}_id"].map(paths)
        return frame

    def to_torch(self) -> torch.utils.data.Dataset[dict[str, Any]]:
        """Map-style torch data set: items as of this one, with `image` as uint8 tensor [3, H, W] and `audio` as tensor [T]."""
        from pipeline_steps.commands.torch_pairs import TorchPairs

        return TorchPairs(self)

    def to_datasets(self) -> datasets.Dataset:
        """Data set of the library `datasets`, in memory, with the columns of `sonify export --hf`.

        All pairs are included, whatever their licenses. Reading column `audio` needs the package torchcodec; without it, cast
        the column to `datasets.Audio(decode=False)`.

        Raises:
            ConfigError: the library is not installed.
        """
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise ConfigError("the package datasets is not installed", "pip install 'seeing-sound[datasets]'") from error
        from pipeline_steps.pair.release.export import pair_table

        return datasets.Dataset(pair_table(self._layout, self.rows))


def _layout(project: FilePath | None) -> ProjectPaths:
    """Paths of a project; None selects the current folder or the nearest above it with `dvc.yaml`."""
    if project is None:
        return ProjectPaths(find_root(Path()) or Path())
    if not Path(project).is_dir():
        raise ConfigError(f"project {os.fspath(project)} is not a folder", "give the folder that contains dvc.yaml")
    return ProjectPaths(Path(project))


def _waveforms(layout: ProjectPaths, sounds: Sequence[Sound], sampling_rate: int | None) -> list[FloatArray]:
    """Sounds as mono float32 [T] at 48 kHz; one process decodes all files."""
    from pipeline_steps.commands.console import ingest_config
    from pipeline_steps.commands.draw import load_audio
    from pipeline_steps.ingest.stage import decoder_pool

    with decoder_pool(ingest_config(layout)) as workers:
        return [
            _mono_48k(sound, sampling_rate) if isinstance(sound, np.ndarray) else load_audio(layout, Path(sound), workers)
            for sound in sounds
        ]


def _mono_48k(samples: npt.NDArray[Any], sampling_rate: int | None) -> FloatArray:
    """Samples [T] or [T, channels] as mono float32 [T] at 48 kHz."""
    from pipeline_steps.audio.resample import resample

    if sampling_rate is None:
        raise ConfigError("an array of samples has no sampling rate", "pass sampling_rate, in Hz")
    if not 1_000 <= sampling_rate <= 1_000_000:
        raise ConfigError(f"sampling_rate: {sampling_rate} is not between 1,000 and 1,000,000 Hz", "pass the rate of the array")
    if samples.ndim not in (1, 2) or not samples.size or (samples.ndim == 2 and samples.shape[1] > MAX_CHANNELS):
        raise DataError(
            f"the samples have the shape {list(samples.shape)}", "give [T], or [T, channels] as soundfile.read does"
        )
    if np.issubdtype(samples.dtype, np.signedinteger):
        samples = samples / -float(np.iinfo(samples.dtype).min)
    elif not np.issubdtype(samples.dtype, np.floating):
        raise DataError(f"the samples are {samples.dtype}", "give floats in [-1, 1] or signed integers")
    mono = (samples.mean(axis=1) if samples.ndim == 2 else samples).astype(np.float32)
    if not np.isfinite(mono).all():
        raise DataError("the samples contain NaN or infinity", "give finite samples")
    return resample(mono, sampling_rate, SAMPLE_RATE)
