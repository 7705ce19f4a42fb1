"""`sonify draw`: generate images from audio files, mixed and in a room."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from pipeline_steps.commands.audio_scene import (
    MAX_GAIN_DB,
    MIN_GAIN_DB,
    AudioScene,
    Room,
    SceneSound,
    SweptSetting,
    gain_label,
    scene_notes,
)
from pipeline_steps.commands.console import JsonFlag, handle_errors, ingest_config, layout_of, print_result
from pipeline_steps.core.errors import ConfigError, DataError
from pipeline_steps.core.project_paths import ProjectPaths

if TYPE_CHECKING:
    from pipeline_steps.core.array_types import FloatArray
    from pipeline_steps.ingest.worker_pool import WorkerPool


class DrawCommand(TyperCommand):
    """Command whose option `--gain` takes all numbers that follow it: `--gain 0 -12` is `--gain 0 --gain -12`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(repeat_option(args, "--gain")))


def repeat_option(arguments: list[str], option: str) -> Iterator[str]:
    """Arguments with the option before each number of a row of numbers that follows it."""
    numbers = -1  # numbers since the option; -1 outside of it
    for argument in arguments:
        numbers = numbers + 1 if numbers >= 0 and _is_number(argument) else 0 if argument == option else -1
        if numbers > 1:
            yield option
        yield argument


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def load_media(layout: ProjectPaths, path: Path, workers: WorkerPool | None = None) -> tuple[str, bytes]:
    """Kind and normalised payload of a file given by the user, decoded in a child process with limits as in ingest.

    Args:
        layout: project whose limits apply.
        path: any file.
        workers: an open `decoder_pool` of ingest; None starts a process for this file.

    Raises:
        DataError: the file is not a usable image or audio file; the reason has the quarantine code.
    """
    from pipeline_steps.ingest.stage import normalize_file

    if not path.is_file():
        raise ConfigError(f"{path} is not a file", "give an image or audio file")
    _, kind, payload, _ = normalize_file(path, ingest_config(layout), workers)
    return kind, payload


def load_audio(layout: ProjectPaths, path: Path, workers: WorkerPool | None = None) -> FloatArray:
    """Audio file given by the user as mono float32 [T] at 48 kHz; errors as in `load_media`."""
    import numpy as np
    import soundfile

    kind, payload = load_media(layout, path, workers)
    if kind != "audio":
        raise DataError(f"{path} is an image", "give an audio file; for images: sonify find")
    return np.asarray(soundfile.read(io.BytesIO(payload), dtype="float32")[0], np.float32)


@handle_errors
def draw(
    context: typer.Context,
    sounds: Annotated[
        list[Path], typer.Argument(metavar="SOUND...", help="Audio files to mix: WAV, FLAC, OGG/Opus, MP3, AIFF.")
    ],
    gain: Annotated[
        list[float] | None,
        typer.Option(metavar="DB...", help="Gain of each sound in dB, in order; missing ones are 0. Example: --gain 0 -12"),
    ] = None,
    room: Annotated[Room, typer.Option(help="Simulated room, at equal loudness.")] = Room.NONE,
    text: Annotated[str | None, typer.Option(help="Text beside the sound, if the model has a text encoder.")] = None,
    audio_scale: Annotated[
        float | None,
        typer.Option(
            min=0, max=4, help="Weight of the sound beside --text; 0: the text alone, 1: the sound alone; default: 0.5."
        ),
    ] = None,
    sweep: Annotated[
        SweptSetting | None, typer.Option(help="Write a labelled sheet: a row for each gain of the last sound, or each room.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Exported folder, or version, alias or run in the registry; default: the project's model."),
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--output", "--out", help="PNG to write.")] = Path("out.png"),
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of the random generator.")] = 0,
    guidance: Annotated[float | None, typer.Option(min=0, max=100, help="Guidance scale; default: the model's own.")] = None,
    samples: Annotated[int, typer.Option(min=1, max=64, help="Number of images; with --sweep: of each row.")] = 4,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Sampling steps; default: the model's own.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Generate images from a sound, or from several that are mixed, alone or beside a text."""
    layout = layout_of(context)
    if out.suffix.lower() != ".png":
        raise ConfigError(f"--output {out} must end in .png")
    if sweep is SweptSetting.ROOM and room is not Room.NONE:
        raise ConfigError(f"--sweep room draws every room, but --room {room.value} is given", "leave one of them out")
    if text is None and audio_scale is not None:
        raise ConfigError(f"--audio-scale {audio_scale:g} has no meaning without a text", "give --text, or leave it out")
    gains = _gains(gain or [], len(sounds))

    from PIL import Image

    from pipeline_steps.audio.loudness import integrated_loudness
    from pipeline_steps.commands.image_sheet import image_grid, labelled_sheet
    from pipeline_steps.commands.scene_generation import GenerationSettings, generate_images, model_folder
    from pipeline_steps.core.atomic import atomic_path
    from pipeline_steps.core.media_shards import SAMPLE_RATE
    from pipeline_steps.diffusion.pipelines.auto import AutoAudio2ImagePipeline

    folder = model_folder(layout, model)
    scene = AudioScene(
        tuple(SceneSound(path.name, load_audio(layout, path), gain_db) for path, gain_db in zip(sounds, gains, strict=True)),
        room,
    )
    rows = [("", scene)] if sweep is None else scene.sweep(sweep)
    waveforms = [row.waveform() for _, row in rows]
    settings = GenerationSettings(samples, seed, guidance, steps, text)
    if audio_scale is not None:
        settings = replace(settings, audio_scale=audio_scale)
    pipeline = AutoAudio2ImagePipeline.from_pretrained(folder)
    images = generate_images(pipeline, waveforms, settings, [row.tracks() for _, row in rows])
    sheet = Image.fromarray(image_grid(images[0]))
    if sweep is not None:
        sheet = labelled_sheet(images, [label for label, _ in rows], _title(scene, sweep, text))
    with atomic_path(out) as temporary:
        sheet.save(temporary, format="PNG")

    notes = scene_notes(scene, waveforms, pipeline.generation_config.max_seconds)
    given = {"guidance_scale": guidance, "steps": steps, "text": text}
    value = {
        "out": str(out),
        "model": str(folder),
        "sounds": [
            {"path": str(path), "gain_db": sound.gain_db, "seconds": round(len(sound.samples) / SAMPLE_RATE, 3)}
            for path, sound in zip(sounds, scene.sounds, strict=True)
        ],
        "rows": [
            {
                "label": label,
                "room": row.room.value,
                "gains_db": [sound.gain_db for sound in row.sounds],
                "lufs": round(loudness, 1) if math.isfinite(loudness := integrated_loudness(waveform, SAMPLE_RATE)) else None,
            }
            for (label, row), waveform in zip(rows, waveforms, strict=True)
        ],
        "samples": samples,
        "seed": seed,
        **{key: value for key, value in given.items() if value is not None},
        "notes": notes,
    }
    print_result(value, [str(out), *(f"note: {note}" for note in notes)], as_json)


def _gains(given: list[float], count: int) -> list[float]:
    """Gain of each of `count` sounds; 0 dB for those without a given one."""
    if len(given) > count:
        raise ConfigError(f"--gain has {len(given)} values for {count} sounds", "give one value for each sound")
    for gain in given:
        if not MIN_GAIN_DB <= gain <= MAX_GAIN_DB:
            raise ConfigError(f"--gain {gain:g} is not between {MIN_GAIN_DB:g} and {MAX_GAIN_DB:g} dB")
    return [*given, *[0.0] * (count - len(given))]


def _title(scene: AudioScene, sweep: SweptSetting, text: str | None) -> str:
    """Title of a sheet: what all rows have in common, and what they differ in."""
    last = scene.sounds[-1]
    sounds = scene.sounds[:-1] if sweep is SweptSetting.GAIN else scene.sounds
    parts = [f"{sound.name} {gain_label(sound.gain_db)}" for sound in sounds]
    parts.append(f"gain of {last.name}" if sweep is SweptSetting.GAIN else "rooms")
    parts += [f"room {scene.room.value}"] if scene.room is not Room.NONE else []
    return ", ".join([*parts, *([f'beside "{text}"'] if text else [])])
