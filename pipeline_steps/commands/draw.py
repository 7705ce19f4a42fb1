"""`sonify draw`: pictures from any sound file."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline_steps.commands.console import JsonFlag, handle_errors, layout_of, print_result
from pipeline_steps.core.errors import ConfigError, DataError
from pipeline_steps.core.project_paths import ProjectPaths

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def image_grid(pictures: npt.NDArray[np.uint8], gap: int = 2) -> npt.NDArray[np.uint8]:
    """Pictures [N, H, W, 3] as one picture: nearly square, rows first, white gaps of `gap` px."""
    import numpy as np

    count, height, width, _ = pictures.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        top, left = (number // columns) * (height + gap), (number % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = picture
    return canvas


def load_audio(layout: ProjectPaths, path: Path) -> npt.NDArray[np.float32]:
    """Any sound file as mono float32 [T] at 48 kHz, decoded in a child process with limits, as ingest does.

    Raises:
        DataError: the file is no usable sound; the reason holds ingest's code.
    """
    import numpy as np
    import soundfile

    kind, payload, _ = load_media(layout, path)
    if kind != "audio":
        raise DataError(f"{path} is a picture", "name a sound file; for pictures: sonify find")
    samples, _ = soundfile.read(io.BytesIO(payload), dtype="float32")
    return np.asarray(samples, np.float32)


def load_media(layout: ProjectPaths, path: Path) -> tuple[str, bytes, dict[str, Any]]:
    """Kind, normalised payload and measurements of a file that a person names."""
    from pipeline_steps.core.config import load_params, parse_section
    from pipeline_steps.ingest.config import IngestConfig
    from pipeline_steps.ingest.stage import normalize_file

    if not path.is_file():
        raise ConfigError(f"{path} is not a file", "name a picture or sound file")
    config = parse_section(IngestConfig, "ingest", load_params(layout.params)) if layout.params.is_file() else IngestConfig()
    _, kind, payload, measured = normalize_file(path, config)
    return kind, payload, measured


@handle_errors
def draw(
    context: typer.Context,
    sound: Annotated[Path, typer.Argument(metavar="SOUND", help="Sound file: WAV, FLAC, OGG/Opus, MP3, AIFF.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="PNG to write.")] = Path("out.png"),
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Same seed, same pictures.")] = 0,
    guidance: Annotated[float | None, typer.Option(min=0, max=100, help="Guidance scale; default: the model's own.")] = None,
    samples: Annotated[int, typer.Option(min=1, max=64, help="Pictures in the grid.")] = 4,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Sampling steps; default: the model's own.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Draw what a sound suggests: a grid of pictures from any sound file."""
    layout = layout_of(context)
    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out} must end in .png")
    if not layout.model.is_dir():
        raise ConfigError(f"there is no trained model in {layout.model}", "sonify run train")
    waveform = load_audio(layout, sound)

    from PIL import Image

    from pipeline_steps.core.atomic import atomic_path
    from pipeline_steps.diffusion.pipelines.auto import AutoAudio2ImagePipeline

    pipeline = AutoAudio2ImagePipeline.from_pretrained(layout.model)
    chosen: dict[str, Any] = {"guidance_scale": guidance, "steps": steps}
    given = {key: value for key, value in chosen.items() if value is not None}
    pictures = pipeline(waveform, num_samples=samples, seed=seed, guidance_scale=guidance, num_inference_steps=steps)
    with atomic_path(out) as temporary:
        Image.fromarray(image_grid(pictures)).save(temporary, format="PNG")
    value = {
        "out": str(out),
        "sound": str(sound),
        "seconds": round(len(waveform) / 48_000, 3),
        "samples": samples,
        "seed": seed,
        **given,
    }
    print_result(value, [str(out)], as_json)
