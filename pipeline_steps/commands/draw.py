"""`sonify draw`: generate images from an audio file."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline_steps.commands.console import JsonFlag, handle_errors, ingest_config, layout_of, print_result
from pipeline_steps.core.errors import ConfigError, DataError
from pipeline_steps.core.project_paths import ProjectPaths

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def image_grid(images: npt.NDArray[np.uint8], gap: int = 2) -> npt.NDArray[np.uint8]:
    """Arrange images [N, H, W, 3] in a nearly square grid, row by row, with white gaps of `gap` px."""
    import numpy as np

    count, height, width, _ = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for number, image in enumerate(images):
        top, left = (number // columns) * (height + gap), (number % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def load_media(layout: ProjectPaths, path: Path) -> tuple[str, bytes]:
    """Kind and normalised payload of a file given by the user, decoded in a child process with limits as in ingest.

    Raises:
        DataError: the file is not a usable image or audio file; the reason has the quarantine code.
    """
    from pipeline_steps.ingest.stage import normalize_file

    if not path.is_file():
        raise ConfigError(f"{path} is not a file", "give an image or audio file")
    _, kind, payload, _ = normalize_file(path, ingest_config(layout))
    return kind, payload


@handle_errors
def draw(
    context: typer.Context,
    sound: Annotated[Path, typer.Argument(metavar="SOUND", help="Audio file: WAV, FLAC, OGG/Opus, MP3, AIFF.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="PNG to write.")] = Path("out.png"),
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of the random generator.")] = 0,
    guidance: Annotated[float | None, typer.Option(min=0, max=100, help="Guidance scale; default: the model's own.")] = None,
    samples: Annotated[int, typer.Option(min=1, max=64, help="Number of images.")] = 4,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Sampling steps; default: the model's own.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Generate images from an audio file and write them as a grid."""
    layout = layout_of(context)
    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out} must end in .png")
    if not layout.model.is_dir():
        raise ConfigError(f"{layout.model}: there is no trained model", "sonify run train")
    kind, payload = load_media(layout, sound)
    if kind != "audio":
        raise DataError(f"{sound} is an image", "give an audio file; for images: sonify find")
    import soundfile
    from PIL import Image

    from pipeline_steps.core.atomic import atomic_path
    from pipeline_steps.diffusion.pipelines.auto import AutoAudio2ImagePipeline

    waveform = soundfile.read(io.BytesIO(payload), dtype="float32")[0]
    pipeline = AutoAudio2ImagePipeline.from_pretrained(layout.model)
    given = {key: value for key, value in (("guidance_scale", guidance), ("steps", steps)) if value is not None}
    images = pipeline(waveform, num_samples=samples, seed=seed, guidance_scale=guidance, num_inference_steps=steps)
    with atomic_path(out) as temporary:
        Image.fromarray(image_grid(images)).save(temporary, format="PNG")
    value = {
        "out": str(out),
        "sound": str(sound),
        "seconds": round(len(waveform) / 48_000, 3),
        "samples": samples,
        "seed": seed,
        **given,
    }
    print_result(value, [str(out)], as_json)
