"""A hub's cache with a tiny checkpoint of the true architecture under every id and commit that a preset names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.factories.checkpoints.ast import ast_checkpoint
from tests.factories.checkpoints.clap import clap_checkpoint
from tests.factories.checkpoints.stable_diffusion import stable_diffusion
from tests.factories.checkpoints.vision_towers import dinov2_checkpoint
from tests.factories.checkpoints.vlm import talkative_qwen3_vl

BUILDERS: dict[str, Callable[[Path], Path]] = {
    "caption.vlm": talkative_qwen3_vl,
    "embed.clap": clap_checkpoint,
    "train.audio.ast": ast_checkpoint,
    "train.ip_adapter.backbone": stable_diffusion,
    "evaluate.judge_checkpoints.dinov2": dinov2_checkpoint,
}
"""Key of params.yaml -> what writes a checkpoint of the architecture that stands there."""


def named_models(node: Any, path: str = "") -> dict[str, tuple[str, str]]:
    """Key -> (hub id, commit) of every model that the parameters name."""
    if not isinstance(node, Mapping):
        return {}
    here = {path: (str(node["model"]), str(node["revision"]))} if node.get("model") and "revision" in node else {}
    for name, value in node.items():
        here |= named_models(value, f"{path}.{name}".lstrip("."))
    return here


def fill_hub(folder: Path, params: Any, sounds: Sequence[Path]) -> dict[str, str]:
    """Write the cache as huggingface_hub keeps it; returns the environment in which it is read, and nothing is fetched."""
    named = named_models(params)
    assert set(named) == set(BUILDERS), "a preset that names another model needs a tiny one of that architecture here"
    for key, (model, commit) in named.items():
        snapshot = folder / "hub" / f"models--{model.replace('/', '--')}" / "snapshots" / commit
        BUILDERS[key](snapshot)
        if key == "embed.clap":
            spread(snapshot, sounds)
    return {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}


def spread(folder: Path, sounds: Sequence[Path]) -> None:
    """Take out of a CLAP the mean that all its vectors share while it is untrained.

    Else every two sounds have a cosine above 0.999: duplicates of each other, of which none could be paired.
    """
    import soundfile
    import torch
    from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel

    model, extractor = ClapModel.from_pretrained(folder).eval(), ClapFeatureExtractor.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    random = np.random.default_rng(0)
    texts = ["".join(map(chr, random.integers(32, 1024, random.integers(3, 80)))) for _ in range(64)]
    waves = [soundfile.read(path, frames=480_000, always_2d=True)[0].mean(1) for path in sounds]
    with torch.no_grad():
        heard = extractor(waves, sampling_rate=48_000, return_tensors="pt")
        read = tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
        for inside, projection, given in (
            (model.audio_model, model.audio_projection, heard),
            (model.text_model, model.text_projection, read),
        ):
            projection.linear2.bias -= projection(inside(**given).pooler_output).mean(0)
    model.save_pretrained(folder)
