"""Computations of the demo page, without its widgets: decode, mix, draw, find, examples, versions of the model."""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import soundfile

from pipeline_steps.commands.audio_scene import MAX_GAIN_DB, MIN_GAIN_DB, AudioScene, Room, SceneSound, gain_label, scene_notes
from pipeline_steps.commands.console import ingest_config
from pipeline_steps.commands.draw import load_audio, load_media
from pipeline_steps.commands.find import AudioFinder, FoundAudio, load_image
from pipeline_steps.commands.scene_generation import GenerationSettings, generate_images, model_folder
from pipeline_steps.core.array_types import ByteArray, FloatArray
from pipeline_steps.core.errors import ConfigError, DataError, ServiceError
from pipeline_steps.core.media_shards import SAMPLE_RATE, MediaShardReader
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import AUDIO, IMAGES
from pipeline_steps.core.tables import read_table
from pipeline_steps.diffusion.pipelines.auto import AutoAudio2ImagePipeline
from pipeline_steps.diffusion.pipelines.base import AudioConditionedPipeline
from pipeline_steps.diffusion.pipelines.safetensors_io import INDEX
from pipeline_steps.ingest.stage import decoder_pool
from pipeline_steps.tracking.errors import EntryRejectedError

NUM_SAMPLES = 4
MAX_SECONDS = 60.0
"""Longest sound in seconds, if stage `ingest` does not set a lower limit."""
MAX_SEED = 2**31 - 1
MAX_GUIDANCE = 20.0
MAX_AUDIO_SCALE = 1.0
MAX_LOADED_MODELS = 2
SHOWN_VERSIONS = 20


@dataclass(frozen=True, slots=True)
class Drawing:
    """Images drawn from a scene.

    Attributes:
        images: uint8 [NUM_SAMPLES, H, W, 3].
        mixture: the audio that the model gets, as 16-bit WAV at its own level.
        label: sounds, gains, room, text and seed in one line; names in it are untrusted.
        notes: what the user should know about the audio.
        seconds: from the start of decoding to the images.
    """

    images: ByteArray
    mixture: bytes
    label: str
    notes: tuple[str, ...]
    seconds: float


class DemoBackend:
    """Context manager for one decoding process and the loaded models. Calls from several threads run one after the other.

    Args:
        layout: project whose model, pool and limits are used.
        model: folder, version, alias or run of the model that is selected at first; None: the project's model.
    """

    def __init__(self, layout: ProjectPaths, model: str | None = None) -> None:
        self._layout = layout
        self._model = model
        self._lock = threading.Lock()
        self._loaded: dict[tuple[Path, int], AudioConditionedPipeline] = {}
        self._finder: AudioFinder | None = None
        self._stack = ExitStack()
        self._workers = decoder_pool(ingest_config(layout))

    def __enter__(self) -> DemoBackend:
        self._stack.enter_context(self._workers)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def models(self) -> dict[str, str | None]:
        """Shown name -> model: the one selected at first, then the newest versions of the registry if it answers."""
        from pipeline_steps.tracking.registry.model_registry import ModelRegistry

        shown = {self._model or str(self._layout.model.relative_to(self._layout.root)): self._model}
        try:
            versions = ModelRegistry(self._layout).versions()
        except (ConfigError, ServiceError, EntryRejectedError):  # nothing is tracked, or the server is unavailable
            return shown
        for info in reversed(versions[-SHOWN_VERSIONS:]):
            shown[" ".join((f"version {info.version}", *(f"@{alias}" for alias in info.aliases)))] = info.version
        return shown

    def pipeline(self, model: str | None) -> AudioConditionedPipeline:
        """Loaded model; it is loaded again after its folder was replaced. Errors as in `model_folder`."""
        folder = model_folder(self._layout, model)
        index = folder / INDEX
        key = folder, index.stat().st_mtime_ns if index.is_file() else 0
        if key not in self._loaded:
            while len(self._loaded) >= MAX_LOADED_MODELS:
                del self._loaded[next(iter(self._loaded))]
            self._loaded[key] = AutoAudio2ImagePipeline.from_pretrained(folder)
        return self._loaded[key]

    def draw(
        self, sounds: Sequence[tuple[Path, float]], room: Room, settings: GenerationSettings, model: str | None = None
    ) -> Drawing:
        """Images from files with gains in dB, mixed in a room.

        Raises:
            ConfigError: a value is out of range, the text is too long, or there is no model.
            DataError: a file is not a usable sound; the reason has the quarantine code.
        """
        start = time.perf_counter()
        for _, gain in sounds:
            _check_range("the gain", gain, MIN_GAIN_DB, MAX_GAIN_DB)
        _check_range("the seed", settings.seed, 0, MAX_SEED)
        _check_range("the guidance scale", settings.guidance_scale or 0.0, 0, MAX_GUIDANCE)
        _check_range("the weight of the sound", settings.audio_scale, 0, MAX_AUDIO_SCALE)
        with self._lock:
            pipeline = self.pipeline(model)
            scene = AudioScene(tuple(SceneSound(path.name, self._audio(path), gain) for path, gain in sounds), room)
            waveform = scene.waveform()
            images = generate_images(pipeline, [waveform], settings, [scene.tracks()])[0]
        label = " + ".join(f"{sound.name} {gain_label(sound.gain_db)}" for sound in scene.sounds)
        parts = [label, *([room.value] if room is not Room.NONE else []), *([f'"{settings.text}"'] if settings.text else [])]
        notes = scene_notes(scene, [waveform], pipeline.generation_config.max_seconds)
        shown = ", ".join([*parts, f"seed {settings.seed}"])
        return Drawing(images, wav_bytes(waveform), shown, tuple(notes), time.perf_counter() - start)

    def find(self, path: Path) -> tuple[ByteArray, FoundAudio]:
        """Pixels of an image file as the captioner gets them, and the audio that the image suggests.

        Raises:
            DataError: the file is not a usable image, or the pool has no usable embeddings.
        """
        with self._lock:
            with _errors_without_folder(path):
                kind, payload = load_media(self._layout, path, self._workers)
            if kind != "image":
                raise DataError(f"{path.name} is a sound", "drop sounds on the other tab")
            pixels = load_image(payload)
            self._finder = self._finder or AudioFinder(self._layout)
            return pixels, self._finder.find(path.name, pixels)

    def examples(self, kind: str) -> dict[str, str]:
        """Item id -> name of held-out items, `kind` image or audio; empty without a catalog."""
        table, schema, key = ("images", IMAGES, "image_id") if kind == "image" else ("audio", AUDIO, "audio_id")
        path = self._layout.catalog / f"{table}.parquet"
        if not path.is_file() or not self._layout.media.is_dir():
            return {}
        rows = sorted((row for row in read_table(path, schema).to_pylist() if row["holdout"]), key=lambda row: str(row["path"]))
        return {row[key]: Path(row["path"]).stem for row in rows}

    def payload(self, item: str) -> bytes:
        """Normalised payload of an item of the pool: PNG or FLAC."""
        return MediaShardReader(self._layout.media).payload(item)

    def audio_file(self, audio_id: str) -> bytes:
        """Clip of the pool as 16-bit WAV."""
        return wav_bytes(MediaShardReader(self._layout.media).sound(audio_id))

    def _audio(self, path: Path) -> FloatArray:
        with _errors_without_folder(path):
            samples = load_audio(self._layout, path, self._workers)
        if len(samples) > MAX_SECONDS * SAMPLE_RATE:
            raise DataError(f"{path.name} has {len(samples) / SAMPLE_RATE:.1f} s", f"use at most {MAX_SECONDS:g} s")
        return samples


def wav_bytes(samples: FloatArray) -> bytes:
    """Clip [T] at 48 kHz as 16-bit WAV, not normalized."""
    stream = io.BytesIO()
    soundfile.write(stream, np.clip(samples, -1.0, 1.0), SAMPLE_RATE, subtype="PCM_16", format="WAV")
    return stream.getvalue()


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name} is {value:g}", f"choose a value between {low:g} and {high:g}")


@contextmanager
def _errors_without_folder(path: Path) -> Iterator[None]:
    """Errors about a file name it without its folder, which is a temporary one."""
    try:
        yield
    except DataError as error:
        reason = error.reason.replace(f"{Path(os.path.realpath(path)).parent}/", "").replace(f"{path.parent}/", "")
        raise DataError(reason, error.action) from error
