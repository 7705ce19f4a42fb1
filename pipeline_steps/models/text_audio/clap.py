"""Text-audio space `clap`: any ClapModel checkpoint of transformers, by hub id and commit or by folder (Elizalde et al. 2022,
Wu et al. 2023, arXiv 2211.06687).

Long sounds are cut into fixed windows whose vectors are averaged, short ones are repeated: never the random crop of the
original, which gives one file many vectors. On a CPU each window and each batch of texts has a fixed shape and one core, so
that a vector's bytes depend on its own sound or text alone, not on its neighbours or the number of cores.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch

from pipeline_steps.audio.log_mel import ClapFeatureConfig, clap_log_mel, map_threads, split_windows
from pipeline_steps.audio.resample import resample
from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.core.errors import ConfigError, IntegrityError, ResourceError
from pipeline_steps.core.l2_normalize import l2_normalize
from pipeline_steps.models.hub_checkpoint import HubModel, check_checkpoint, load_weights, resolve_device, resolve_dtype
from pipeline_steps.models.text_audio import int8_calibration

STORED_RATE = 48_000
KEY = "embed.clap"
TEXTS_TOGETHER = 16
"""Texts of a forward pass; a smaller rest is filled up."""
LONGEST_TEXT = 77
"""Tokens the published checkpoints were trained with; what is longer is cut."""
TOKEN_STEP = 4
"""Texts are padded to a multiple of this."""
WINDOWS_TOGETHER = 64
"""Windows of a forward pass on a GPU; a smaller rest is filled up."""

Backend = Literal["torch", "openvino", "openvino-int8"]
EXACT = "audio_projection"
"""The last two layers stay in float32: they cost nothing, and every later comparison of vectors rests on them."""


def read_front_end(folder: Path) -> ClapFeatureConfig:
    """Front-end that a checkpoint's preprocessor_config.json (or, since transformers 5, processor_config.json) describes.

    Raises:
        IntegrityError: neither file is there, or it describes what CLAP's extractor does not do.
    """
    for name in ("preprocessor_config.json", "processor_config.json"):
        if not (folder / name).is_file():
            continue
        settings = json.loads((folder / name).read_text(encoding="utf-8"))
        settings = settings.get("feature_extractor", settings)
        if "fft_window_size" not in settings:
            continue
        if settings.get("top_db") is not None:
            raise IntegrityError(f"{folder / name}: top_db is set", "no published CLAP cuts the range of its mel; unset it")
        return ClapFeatureConfig(
            sample_rate=int(settings["sampling_rate"]),
            seconds=float(settings["max_length_s"]),
            fft=int(settings["fft_window_size"]),
            hop=int(settings["hop_length"]),
            bands=int(settings["feature_size"]),
            low=float(settings["frequency_min"]),
            high=float(settings["frequency_max"]),
            scale="htk" if settings.get("truncation") == "fusion" else "slaney",
        )
    raise IntegrityError(f"{folder}: preprocessor_config.json is missing", "fetch the checkpoint again, with all its files")


class ClapEncoder(HubModel):
    """`TextAudioEncoder` over transformers' ClapModel. Weights from safetensors alone, no code of the checkpoint.

    Args:
        model: hub id or local folder.
        revision: commit of a hub id; sha256 of a folder, checked when given.
        device: auto, cpu or cuda.
        precision: auto (bfloat16 on GPU, float32 on CPU), float32 or bfloat16.
        backend: torch, or for the sounds openvino or openvino-int8 (CPU; the extra `openvino`).
        root: folder that a relative `model` may lie in.
    """

    name = "clap"
    families = ("clap",)
    family = "clap"
    version = 1

    def __init__(
        self,
        model: str,
        revision: str = "",
        device: str = "auto",
        precision: str = "auto",
        backend: Backend = "torch",
        root: Path = Path(),
    ) -> None:
        super().__init__(model, revision, KEY, root)
        self.backend = backend
        self.device = resolve_device("cpu" if device == "auto" and backend != "torch" else device, KEY)
        if backend != "torch" and self.device != "cpu":
            raise ConfigError(
                f"{KEY}.backend {backend} computes on the CPU", f"set {KEY}.device to cpu, or the backend to torch"
            )
        self.precision = resolve_dtype(precision, self.device)
        self._config: dict[str, Any] = {}
        self._network: Any = None
        self._tokenizer: Any = None
        self._sounds: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.front_end = ClapFeatureConfig()

    def _accept(self, folder: Path) -> None:
        self._config = check_checkpoint(folder)
        if self._config.get("model_type") != "clap":
            raise ConfigError(
                f"{KEY}.model: {self.model} is of type {self._config.get('model_type')}, not clap",
                "name a ClapModel checkpoint; laion-clap's own .pt files are for embed.encoder laion, or convert them",
            )
        self.front_end = read_front_end(folder)
        bands = (self._config.get("audio_config") or {}).get("num_mel_bins", 64)
        if bands != self.front_end.bands:
            raise IntegrityError(f"{folder}: the model hears {bands} mel bands, its extractor makes {self.front_end.bands}")

    @property
    def dimension(self) -> int:
        """Numbers in a vector."""
        self.fetch()
        return int(self._config.get("projection_dim", 512))

    @property
    def parameters(self) -> dict[str, Any]:
        """What the constructor needs to make this space again; a folder outside the project is not written down."""
        if Path(self.model).is_absolute():
            return {}
        return {"model": self.model, "revision": self.revision, "precision": self.precision, "backend": self.backend}

    def describe_texts(self) -> dict[str, Any]:
        """Everything but the text that shapes its vector."""
        shape = [TEXTS_TOGETHER, TOKEN_STEP, LONGEST_TEXT]
        return {"name": self.name, "version": self.version, **self.identity, "precision": self.precision, "shape": shape}

    def describe_sounds(self) -> dict[str, Any]:
        """Everything but the sound that shapes its vector."""
        mark = {
            "name": self.name,
            "version": self.version,
            **self.identity,
            "precision": self.precision,
            "backend": self.backend,
        }
        return {**mark, "int8": self.describe_int8()} if self.backend == "openvino-int8" else mark

    def describe_int8(self) -> dict[str, Any]:
        """Everything that shapes the quantised network."""
        return {**self.identity, "calibration": int8_calibration.VERSION, "exact": EXACT}

    def describe(self) -> dict[str, Any]:
        """Name, family, checkpoint and precision: the fingerprint of the space."""
        return {"family": self.family, "texts": self.describe_texts(), "sounds": self.describe_sounds()}

    def load(self) -> Self:
        """Load tokenizer and weights; calling it again does nothing.

        Raises:
            ConfigError: the extra that the backend needs is not installed.
            IntegrityError: weights are missing or have another shape than the configuration says.
        """
        if self._network is None:
            from transformers import AutoTokenizer, ClapModel

            folder = self.fetch()
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            except (OSError, ValueError, KeyError) as error:
                reason = f"{KEY}.model: no usable tokenizer: {' '.join(str(error).split())[:200]}"
                raise IntegrityError(reason, "fetch the checkpoint again, with all its files") from error
            self._network = load_weights(ClapModel, folder, KEY, torch.float32).to(self.device).eval()
            self._sounds = self._forward_windows
            if self.backend == "openvino":
                from pipeline_steps.models.text_audio.openvino import compile_model

                self._sounds = compile_model(_AudioTower(self._network), self._example(), torch.get_num_threads())
            elif self.backend == "openvino-int8":
                self._sounds = None  # with the first sound: who asks with a text needs no quantised network
        return self

    def int8_network(self) -> bytes:
        """The audio tower in 8-bit integers, for `adopt_int8_network`: a minute's work that need not be done twice.

        Raises:
            ConfigError: the extra `openvino` is not installed.
        """
        from pipeline_steps.models.text_audio.openvino import quantize_int8

        self.load()
        mel = self.front_end
        sounds = torch.from_numpy(np.stack(list(int8_calibration.calibration_signals(mel.samples, mel.sample_rate))))
        with torch.inference_mode():
            features = [clap_log_mel(sound[None], mel)[:, None] for sound in sounds]
        return quantize_int8(_AudioTower(self._network), self._example(), features, EXACT)

    def adopt_int8_network(self, block: bytes) -> None:
        """Hear with this network, which `int8_network` made, here or elsewhere.

        Raises:
            ConfigError: the extra `openvino` is not installed.
        """
        from pipeline_steps.models.text_audio.openvino import load_compiled

        self._sounds = load_compiled(block, torch.get_num_threads())

    def _example(self) -> torch.Tensor:
        mel = self.front_end
        return torch.zeros(1, 1, 1 + mel.samples // mel.hop, mel.bands)

    def prepare(self, samples_48k: FloatArray) -> FloatArray:
        """Windows [N, T] of a mono 48 kHz sound at the checkpoint's sample rate.

        Raises:
            ValueError: empty, not one-dimensional, or holding NaN or infinity.
        """
        samples = np.asarray(samples_48k, np.float32)
        rate = self.front_end.sample_rate
        samples = resample(samples, STORED_RATE, rate) if samples.size and rate != STORED_RATE else samples
        return split_windows(samples, self.front_end.samples)

    def encode_prepared(self, sounds: Sequence[FloatArray]) -> FloatArray:
        """Unit rows [N, dimension] of the windows of N sounds: the mean over the unit vectors of their windows."""
        if not len(sounds):
            return np.zeros((0, self.dimension), np.float32)
        if self._sounds is None and self._network is not None:  # openvino-int8, and nobody has given us the network
            self.adopt_int8_network(self.int8_network())
        windows = torch.from_numpy(np.concatenate(sounds))
        together = WINDOWS_TOGETHER if self.device == "cuda" else 1
        vectors = self._batched(self._embed_windows, windows, together).astype(np.float64)
        ends = np.cumsum([len(sound) for sound in sounds])
        return l2_normalize(np.stack([part.mean(0) for part in np.split(vectors, ends[:-1])]).astype(np.float32))

    def encode_sounds(self, sounds: Sequence[FloatArray]) -> FloatArray:
        """Unit rows [N, dimension] of mono 48 kHz sounds."""
        return self.encode_prepared([self.prepare(sound) for sound in sounds])

    def encode_texts(self, texts: Sequence[str]) -> FloatArray:
        """Unit rows [N, dimension] of texts, in batches of texts of like length."""
        rows = np.zeros((len(texts), self.dimension), np.float32)
        by_length: dict[int, list[int]] = {}
        ids = [self._tokenizer(text, truncation=True, max_length=LONGEST_TEXT)["input_ids"] for text in texts]
        for row, tokens in enumerate(ids):
            by_length.setdefault(-(-len(tokens) // TOKEN_STEP) * TOKEN_STEP, []).append(row)
        for length, members in sorted(by_length.items()):
            padded = torch.full((len(members), length), int(self._tokenizer.pad_token_id))
            for place, row in enumerate(members):
                padded[place, : len(ids[row])] = torch.tensor(ids[row])
            rows[members] = self._batched(self._embed_texts, padded, TEXTS_TOGETHER)
        return l2_normalize(rows)

    def _batched(self, function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, size: int) -> FloatArray:
        """`function` of rows in batches of exactly `size`; the last one is filled up with its own last row."""
        missing = -len(rows) % size
        full = torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows
        threads = torch.get_num_threads() if self.device == "cpu" else 1
        try:
            parts = map_threads(function, [full[at : at + size] for at in range(0, len(full), size)], threads)
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"GPU memory does not hold {size} items of {self.model}", "free it, or embed.clap.device: cpu"
            ) from error
        return np.asarray(torch.cat(parts)[: len(rows)].float().cpu().numpy())

    @torch.inference_mode()
    def _embed_windows(self, windows: torch.Tensor) -> torch.Tensor:
        if self._sounds is None:
            raise RuntimeError("clap: call load() before use")
        return self._sounds(clap_log_mel(windows.to(self.device), self.front_end)[:, None])

    @torch.inference_mode()
    def _forward_windows(self, features: torch.Tensor) -> torch.Tensor:
        longer = torch.zeros(len(features), 1, dtype=torch.bool, device=features.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bfloat16"):
            pooled: torch.Tensor = self._network.get_audio_features(input_features=features, is_longer=longer).pooler_output
        return pooled

    @torch.inference_mode()
    def _embed_texts(self, ids: torch.Tensor) -> torch.Tensor:
        ids = ids.to(self.device)
        mask = (ids != self._tokenizer.pad_token_id).long()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bfloat16"):
            pooled: torch.Tensor = self._network.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
        return pooled


class _AudioTower(torch.nn.Module):
    """The part of ClapModel that turns log-mel windows [N, 1, frames, bands] into unit rows, as one function to compile."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        longer = torch.zeros(features.shape[0], 1, dtype=torch.bool)
        pooled: torch.Tensor = self.network.get_audio_features(input_features=features, is_longer=longer).pooler_output
        return pooled
