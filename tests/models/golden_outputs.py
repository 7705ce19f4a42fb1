"""A few numbers of each encoder on one picture and one sound. Rewrite the file, and raise the encoder's `version`, when
outputs are meant to change: `python tests/models/golden_outputs.py` in the project folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image

from pipeline_steps.audio.resample import resample
from pipeline_steps.evaluate.judges.aisfx import AiSfx
from pipeline_steps.evaluate.judges.augnet import AugNet
from pipeline_steps.models.audio.yamnet import YamNet
from pipeline_steps.models.text_audio.minilm import MiniLM
from pipeline_steps.models.vision.efficientnet_lite import EfficientNetLite0, EfficientNetLite3
from pipeline_steps.models.vision.ssd_mobilenet_v2 import SsdMobileNetV2

GOLDEN = Path(__file__).with_name("golden.json")
TEXT = "a dog barking in the distance"
ENCODERS = {
    encoder.name: encoder for encoder in (YamNet, MiniLM, EfficientNetLite0, EfficientNetLite3, SsdMobileNetV2, AiSfx, AugNet)
}


def picture(demo: Path, name: str = "i-dog-000") -> np.ndarray:
    with Image.open(demo / f"images/{name}.webp") as image:
        return np.asarray(image.convert("RGB"))


def sound(demo: Path, name: str = "s-dog-003") -> np.ndarray:
    samples, rate = soundfile.read(demo / f"sounds/{name}.ogg", dtype="float32")
    assert rate == 48_000
    return samples


def vectors(name: str, assets: Path, demo: Path) -> dict[str, np.ndarray]:
    """Every output of an encoder on the fixed inputs."""
    encoder: Any = ENCODERS[name](assets).load()
    if name == "yamnet":
        patches = encoder.frames(resample(sound(demo), 48_000, 16_000))
        with torch.inference_mode():
            logits, embedding, feature_map = encoder(patches)
        return {
            "patches": patches.mean((0, 1, 2)),
            "logits": logits.mean(0).numpy(),
            "embedding": embedding.mean(0).numpy(),
            "feature_map": feature_map.mean((0, 2, 3)).numpy(),
        }
    if name == "minilm":
        return {"text": encoder.encode([TEXT])[0]}
    if name == "aisfx":
        return {"embedding": encoder.embed(sound(demo))}
    outputs = {"features": encoder.features([picture(demo)])[0]}
    if name in ("efficientnet_lite0", "efficientnet_lite3"):
        outputs["probabilities"] = encoder.probabilities([picture(demo)])[0]
    if name == "ssd_mobilenet_v2":
        best = encoder.detect([picture(demo)])[0][0]
        outputs["best"] = np.array([best.index, best.score, *best.box])
    return outputs


def digest(values: np.ndarray) -> list[float]:
    """Size, norm and 8 spread values: enough to notice any change."""
    spread = values[np.linspace(0, len(values) - 1, 8).astype(int)]
    return [float(f"{value:.7g}") for value in (len(values), np.linalg.norm(values), *spread)]


def main() -> None:
    root = Path(__file__).resolve().parents[2]
    golden = {
        name: {
            "version": encoder.version,
            "outputs": {key: digest(value) for key, value in vectors(name, root / "data/assets", root / "data/demo").items()},
        }
        for name, encoder in sorted(ENCODERS.items())
    }
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
