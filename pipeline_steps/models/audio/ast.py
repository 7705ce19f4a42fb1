"""Audio tokens `ast`: patches of an Audio Spectrogram Transformer in order of time (Gong et al. 2021, arXiv 2104.01778).

A window has 10.24 s. The published extractor pads a shorter clip with zeros before it normalizes, which gives a constant of
+0.47, where digital silence is -1.28. Here a short clip is repeated to the end of its window, and the tokens after its end are
dropped. Features are normalized by fixed numbers, so tokens contain the loudness.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from pipeline_steps.audio.log_mel import AstFeatureConfig, ast_log_mel, map_threads
from pipeline_steps.audio.resample import resample
from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.core.errors import ConfigError, IntegrityError
from pipeline_steps.models.hub_checkpoint import HubModel, check_checkpoint, load_weights, resolve_device, resolve_dtype

STORED_RATE = 48_000
MODEL_TYPE = "audio-spectrogram-transformer"
WINDOWS_TOGETHER = 16
"""Windows of a forward pass on a GPU; a smaller batch is padded."""


def load_feature_extractor_config(folder: Path) -> AstFeatureConfig:
    """Front-end that a checkpoint's `preprocessor_config.json` describes.

    Raises:
        IntegrityError: the file is missing, or describes features that are not normalized.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise IntegrityError(f"{path} is missing", "fetch the checkpoint again, with all its files")
    settings = json.loads(path.read_text(encoding="utf-8"))
    if not settings.get("do_normalize", True):
        raise IntegrityError(
            f"{path}: do_normalize is false; true is required", "set it to true, as in published AST checkpoints"
        )
    kept = ("sampling_rate", "num_mel_bins", "max_length", "mean", "std")
    return AstFeatureConfig(*(kind(settings[name]) for name, kind in zip(kept, (int, int, int, float, float), strict=True)))


class AstEncoder(HubModel):
    """`AudioTokenizer` over transformers' ASTModel. Runs no code of the checkpoint.

    Args:
        model: hub id or local folder.
        revision: commit of a hub id; sha256 of a folder, checked when given.
        device: auto, cpu or cuda.
        precision: auto (bfloat16 on GPU, float32 on CPU), float32 or bfloat16.
        key: of params.yaml, for messages.
        root: project folder; a relative `model` is resolved against it.
    """

    name = "ast"
    family = "ast"
    version = 1

    def __init__(
        self,
        model: str,
        revision: str = "",
        device: str = "auto",
        precision: str = "auto",
        key: str = "train.audio.ast",
        root: Path = Path(),
    ) -> None:
        super().__init__(model, revision, key, root)
        self.device = resolve_device(device, key)
        self.precision = resolve_dtype(precision, self.device)
        self._config: Any = None
        self._network: Any = None
        self.front_end = AstFeatureConfig()

    def _accept(self, folder: Path) -> None:
        from transformers import ASTConfig

        kind = check_checkpoint(folder).get("model_type")
        if kind != MODEL_TYPE:
            raise ConfigError(f"{self.key}.model: {self.model} is of type {kind}, not {MODEL_TYPE}", "name an AST checkpoint")
        self._config = ASTConfig.from_pretrained(folder, local_files_only=True)
        self.front_end = load_feature_extractor_config(folder)
        if (self._config.num_mel_bins, self._config.max_length) != (self.front_end.bands, self.front_end.frames):
            raise IntegrityError(f"{folder}: model and extractor disagree on bands or frames", "fetch the checkpoint again")

    @property
    def dimension(self) -> int:
        """Length of a token."""
        self.fetch()
        return int(self._config.hidden_size)

    @property
    def bands(self) -> int:
        """Tokens per time step: patches over frequency."""
        self.fetch()
        return (self.front_end.bands - int(self._config.patch_size)) // int(self._config.frequency_stride) + 1

    @property
    def moments(self) -> int:
        """Time steps of a window: patches over time."""
        self.fetch()
        return (self.front_end.frames - int(self._config.patch_size)) // int(self._config.time_stride) + 1

    def describe(self) -> dict[str, Any]:
        """Name, family, checkpoint and precision: everything except the clip that determines its tokens."""
        named = {"name": self.name, "family": self.family, "version": self.version}
        return {**named, **self.identity, "precision": self.precision}

    def load(self) -> Self:
        """Load the weights; a second call does nothing.

        Raises:
            IntegrityError: weights are missing or have another shape than the configuration says.
        """
        if self._network is None:
            from transformers import ASTModel

            self._network = load_weights(ASTModel, self.fetch(), self.key, torch.float32).to(self.device).eval()
        return self

    def tokens(self, samples_48k: FloatArray) -> FloatArray:
        """Tokens [T, dimension] of a mono 48 kHz clip, by time step (0.1 s) and within it from low to high bands."""
        grid = self.grids([samples_48k])[0]
        return grid.reshape(-1, grid.shape[-1])

    def grids(self, sounds: Sequence[FloatArray]) -> list[FloatArray]:
        """Tokens [moments, bands, dimension] of each mono 48 kHz clip; those of several windows are concatenated.

        Raises:
            ValueError: a clip is empty, not one-dimensional, or contains NaN or infinity.
        """
        self.load()
        cut = [self._windows(sound) for sound in sounds]
        if not cut:
            return []
        windows = torch.from_numpy(np.concatenate([parts for parts, _ in cut]))
        together = WINDOWS_TOGETHER if self.device == "cuda" else 1
        missing = -len(windows) % together
        full = torch.cat([windows, windows[-1:].expand(missing, -1)])
        threads = torch.get_num_threads() if self.device == "cpu" else 1
        batches = [full[at : at + together] for at in range(0, len(full), together)]
        made = torch.cat(map_threads(self._forward, batches, threads)).float().cpu().numpy()
        grids, row = [], 0
        for parts, kept in cut:
            grids.append(np.concatenate([made[row + at][:count] for at, count in enumerate(kept)]))
            row += len(parts)
        return grids

    def _windows(self, samples_48k: FloatArray) -> tuple[FloatArray, list[int]]:
        """Consecutive windows [N, samples], the last one repeated to its full length, and the number of valid steps of each."""
        samples = np.asarray(samples_48k, np.float32)
        if samples.ndim != 1 or not samples.size or not np.isfinite(samples).all():
            raise ValueError(f"expected finite mono samples [T], got shape {samples.shape}")
        samples = resample(samples, STORED_RATE, self.front_end.sample_rate)
        if not samples.size:  # less than one sample at the lower rate
            samples = np.zeros(1, np.float32)
        length, step = self.front_end.samples, int(self._config.time_stride) * 160
        # Windows are a whole number of time steps apart, so that the steps are evenly spaced across windows.
        stride = self.moments * step
        starts = range(0, max(1, len(samples) - (length - stride)), stride)
        parts = [samples[start : start + length] for start in starts]
        kept = [min(self.moments, max(1, round(len(part) / step))) for part in parts]
        return np.stack([np.resize(part, length) for part in parts]), kept

    @torch.inference_mode()
    def _forward(self, windows: torch.Tensor) -> torch.Tensor:
        features = ast_log_mel(windows.to(self.device), self.front_end)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bfloat16"):
            hidden = self._network(input_values=features).last_hidden_state[:, 2:]  # without the class and distillation tokens
        # The network orders patches by band; tokens are ordered by time step.
        grid: torch.Tensor = hidden.view(len(windows), self.bands, self.moments, -1).transpose(1, 2)
        return grid
