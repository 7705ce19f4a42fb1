"""Text-audio encoder `pe_av`: Perception Encoder Audiovisual of Meta, a checkpoint of transformers by hub id or folder.

Source: Vyas et al. 2025, arXiv 2512.19687. A checkpoint holds one network for audio, video and text. Text vectors are those of
the head that was trained against audio; the heads for video and for both give other vectors. The text tower is read before
its final norm, as in training: transformers' own methods read it after the norm. A clip is padded by reflection to a multiple
of the hop and encoded at its own length. Clips above 30 s are cut into windows whose vectors are averaged.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field

from pipeline_steps.audio.resample import resample
from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.core.config import StageConfig
from pipeline_steps.core.errors import ConfigError, IntegrityError
from pipeline_steps.core.l2_normalize import l2_normalize
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.models.hub_checkpoint import check_checkpoint
from pipeline_steps.models.text_audio.base import TEXT_AUDIO_ENCODERS
from pipeline_steps.models.text_audio.clap import STORED_RATE, ClapEncoder, ClapEncoderConfig, Device

if TYPE_CHECKING:
    import torch

MODEL_TYPES = ("pe_audio_video", "pe_audio")
WINDOW_SECONDS = 30
"""Seconds of a forward pass. The first convolution of the codec makes 64 channels at the full sample rate."""
GPU_CLIP_BATCH = 16
"""Windows of equal length of a forward pass on a GPU."""


def encoder_settings(config: dict[str, Any], kind: Literal["audio", "video"]) -> dict[str, Any]:
    """Settings of the text tower and of the audio or video encoder in `config.json` of a checkpoint."""
    both = config.get("audio_video_config") or config
    return {"text_config": config.get("text_config"), f"{kind}_config": both.get(f"{kind}_config")}


class PeAvEncoderConfig(StageConfig):
    """Group `embed.pe_av`."""

    model: str = Field(default="", max_length=500, description="hub id or local folder")
    revision: str = Field(
        default="", max_length=64, description="commit (40 hex digits) of a hub id; sha256 of a folder (64), checked when given"
    )
    device: Device = Field(default="auto", description="auto: a GPU if there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(default="auto", description="auto: bfloat16 on GPU, float32 on CPU")


@TEXT_AUDIO_ENCODERS.register("pe_av")
class PeAvEncoder(ClapEncoder):
    """Text-audio encoder over transformers' PeAudioModel. The video encoder of the checkpoint is not loaded."""

    name = "pe_av"
    family = "pe_av"
    families = ("pe_av",)
    version = 1
    config_class = PeAvEncoderConfig
    key = "embed.pe_av"
    max_tokens = 512

    def __init__(self, config: PeAvEncoderConfig, layout: ProjectPaths) -> None:
        super().__init__(ClapEncoderConfig.model_validate(config.model_dump()), layout)
        self.sample_rate, self.hop = STORED_RATE, 0

    @classmethod
    def check_config(cls, config: Any) -> None:
        if not config.model:
            raise ValueError("encoder pe_av needs pe_av.model, a hub id or a folder")

    @classmethod
    def float32_config(cls, config: Any) -> None:
        return None

    def _accept(self, folder: Path) -> None:
        self._model_config = check_checkpoint(folder)
        if self._model_config.get("model_type") not in MODEL_TYPES:
            raise ConfigError(
                f"{self.key}.model: {self.model} is of type {self._model_config.get('model_type')}, not {MODEL_TYPES[0]}",
                "name a PE-AV checkpoint, for example facebook/pe-av-small",
            )
        settings: dict[str, Any] = {}
        for name in ("preprocessor_config.json", "processor_config.json"):
            if (folder / name).is_file():
                read = json.loads((folder / name).read_text(encoding="utf-8"))
                settings = read.get("feature_extractor", read) | settings
        if not {"sampling_rate", "hop_length"} <= set(settings):
            raise IntegrityError(
                f"{folder}: preprocessor_config.json lacks sampling_rate or hop_length",
                "fetch the checkpoint with all its files",
            )
        self.sample_rate, self.hop = int(settings["sampling_rate"]), int(settings["hop_length"])

    @property
    def dimension(self) -> int:
        self.fetch()
        return int((self._model_config.get("text_config") or {}).get("hidden_size", 1024))

    @property
    def parameters(self) -> dict[str, Any]:
        return {name: value for name, value in super().parameters.items() if name != "backend"}

    def describe_audio(self) -> dict[str, Any]:
        named = {"name": self.name, "version": self.version, **self.identity}
        return {**named, "precision": self.dtype, "seconds": WINDOW_SECONDS}

    def load(self) -> Self:
        """Load tokenizer and weights; a second call does nothing.

        Raises:
            IntegrityError: weights are missing or have another shape than the configuration says.
        """
        if self._network is None:
            import torch
            from transformers import PeAudioConfig, PeAudioModel

            self.fetch()
            self._load(PeAudioModel, config=PeAudioConfig(**encoder_settings(self._model_config, "audio")))
            network: Any = self._network
            network.text_model.final_norm = torch.nn.Identity()
        return self

    def prepare_audio(self, samples_48k: FloatArray) -> list[FloatArray]:  # type: ignore[override]
        """Windows of a clip, each a multiple of the hop long; all but the padded last one are 30 s long.

        Raises:
            ValueError: the clip is empty, not one-dimensional, or holds NaN or infinity.
        """
        samples = np.asarray(samples_48k, np.float32)
        if samples.ndim != 1 or not samples.size or not np.isfinite(samples).all():
            raise ValueError(f"expected finite mono samples [T], got shape {samples.shape}")
        self.fetch()
        samples = resample(samples, STORED_RATE, self.sample_rate) if self.sample_rate != STORED_RATE else samples
        length = WINDOW_SECONDS * self.sample_rate
        if len(samples) > length:
            last = len(samples) - length
            return [samples[start : start + length] for start in [*range(0, last, length), last]]
        return [np.pad(samples, (0, -len(samples) % self.hop), "reflect")]

    def audio_rows(self, prepared: Sequence[Any]) -> FloatArray:
        """Unit vectors [N, dimension] of the windows of N clips: the mean over the unit vectors of their windows."""
        import torch

        windows = [window for clip in prepared for window in clip]
        vectors = np.zeros((len(windows), self.dimension), np.float64)
        by_length: dict[int, list[int]] = {}
        for row, window in enumerate(windows):
            by_length.setdefault(len(window), []).append(row)
        for rows in by_length.values():
            size = min(GPU_CLIP_BATCH, len(rows)) if self.device == "cuda" else 1
            stacked = torch.from_numpy(np.stack([windows[row] for row in rows]))
            vectors[rows] = l2_normalize(self._batched(self._embed_windows, stacked, size))
        ends = np.cumsum([len(clip) for clip in prepared])
        means = [part.mean(0) for part in np.split(vectors, ends[:-1])] if len(prepared) else vectors
        return l2_normalize(np.asarray(means, np.float32))

    def _embed_windows(self, windows: torch.Tensor) -> torch.Tensor:
        import torch

        if self._network is None:
            raise RuntimeError("pe_av: call load() before use")
        with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            vectors: torch.Tensor = self._network.get_audio_embeds(windows[:, None].to(self.device))
        return vectors

    def _embed_texts(self, ids: torch.Tensor) -> torch.Tensor:
        import torch

        ids = ids.to(self.device)
        mask = (ids != self._tokenizer.pad_token_id).long()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            read = self._network.text_model(input_ids=ids, attention_mask=mask).last_hidden_state
            vectors: torch.Tensor = self._network.text_audio_head(read[:, 0])
        return vectors
