"""MLflow pyfunc of the exported model. MLflow runs this file (models from code); nothing is unpickled.

Input: a table with the column `audio_base64`, one audio file (WAV, FLAC, OGG, MP3, AIFF) in base64 per row.
Output: a table with the column `png_base64`, one PNG per row; several samples are side by side in one image.
Parameters: `seed`, `guidance_scale` (-1: the model's default), `num_samples` (1..16), `num_inference_steps` (0: the model's
default).
"""

from __future__ import annotations

import base64
import binascii
import io
from pathlib import Path
from typing import Any

import mlflow
import numpy as np

from pipeline_steps.core.array_types import ByteArray, FloatArray

MAX_BYTES = 25_000_000
MAX_SECONDS = 30
MAX_SAMPLES = 16
MAX_STEPS = 1000
RATE = 48_000
UNSET = -1.0
DEFAULTS: dict[str, Any] = {"seed": 0, "guidance_scale": UNSET, "num_samples": 1, "num_inference_steps": 0}
FORMATS = {"WAV", "WAVEX", "FLAC", "OGG", "MP3", "AIFF"}


def decode_audio(text: str) -> FloatArray:
    """Decode the first 30 s of a base64 audio file to mono float32 [T] at 48 kHz.

    Raises:
        ValueError: the text is not base64, or the file is too large, not an accepted audio format, empty or not finite.
    """
    import soundfile
    import soxr

    if len(text) > MAX_BYTES * 4 // 3 + 4:
        raise ValueError(f"the audio file is larger than {MAX_BYTES} bytes")
    try:
        payload = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("audio_base64 is not base64") from error
    try:
        with soundfile.SoundFile(io.BytesIO(payload)) as file:
            if file.format not in FORMATS:
                raise ValueError(f"audio format {file.format} is not accepted; use one of {', '.join(sorted(FORMATS))}")
            rate = int(file.samplerate)
            samples = file.read(frames=min(file.frames, rate * MAX_SECONDS), dtype="float32", always_2d=True).mean(axis=1)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"the audio file cannot be decoded: {error}") from error
    if samples.size == 0 or not np.isfinite(samples).all():
        raise ValueError("the audio is empty or contains NaN or infinity")
    if rate != RATE:
        samples = soxr.resample(samples, rate, RATE, quality="HQ")
    return np.asarray(samples, dtype=np.float32)


def encode_png(images: ByteArray) -> str:
    """Encode images uint8 [N, H, W, 3], side by side, as one PNG in base64."""
    from PIL import Image

    row = np.concatenate(list(images), axis=1)
    buffer = io.BytesIO()
    Image.fromarray(row).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


class Audio2ImagePyfunc(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined, unused-ignore]
    """MLflow model with `predict(table, params)`; see the module's docstring."""

    def load_context(self, context: Any) -> None:
        """Load the exported model."""
        from pipeline_steps.diffusion.pipelines.auto import AutoAudio2ImagePipeline

        self.pipeline = AutoAudio2ImagePipeline.from_pretrained(Path(context.artifacts["model"]))

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # MLflow would read hints as a schema
        """Generate one PNG for each row of `audio_base64`.

        Raises:
            ValueError: a row is not an audio file, or a parameter is out of range.
        """
        import pandas

        values = {**DEFAULTS, **(params or {})}
        count, steps, guidance = int(values["num_samples"]), int(values["num_inference_steps"]), float(values["guidance_scale"])
        if not (1 <= count <= MAX_SAMPLES and 0 <= steps <= MAX_STEPS and (guidance == UNSET or 0.0 <= guidance <= 100.0)):
            raise ValueError(
                f"num_samples must be 1..{MAX_SAMPLES}, num_inference_steps 0..{MAX_STEPS}, guidance_scale 0..100; got {values}"
            )
        options: dict[str, Any] = {
            "num_samples": count,
            "seed": int(values["seed"]),
            "guidance_scale": None if guidance == UNSET else guidance,
            "num_inference_steps": steps or None,
        }
        audio = (decode_audio(str(text)) for text in model_input["audio_base64"])
        return pandas.DataFrame({"png_base64": [encode_png(self.pipeline(samples, **options)) for samples in audio]})


mlflow.models.set_model(Audio2ImagePyfunc())
