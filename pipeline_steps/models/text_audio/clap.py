"""Text-audio encoder `clap`: a ClapModel checkpoint of transformers, by hub id and commit or by folder.

Sources: Elizalde et al. 2022; Wu et al. 2023, arXiv 2211.06687. Long clips are cut into fixed windows whose vectors are
averaged, short clips fill a window as the checkpoint says. The random crop of the original is not used, because it gives one
file many vectors. On a CPU each window and each batch of texts has a fixed shape and one core, so that the bytes of a vector
depend on its own clip or text alone, not on the batch or the number of cores.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline_steps.audio.resample import resample
from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.core.config import StageConfig
from pipeline_steps.core.errors import ConfigError, IntegrityError
from pipeline_steps.core.gpu_memory import gpu_memory_guard
from pipeline_steps.core.l2_normalize import l2_normalize
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.models.hub_checkpoint import HubModel, check_checkpoint, load_weights, resolve_device, resolve_dtype
from pipeline_steps.models.text_audio import int8_calibration
from pipeline_steps.models.text_audio.base import TEXT_AUDIO_ENCODERS, CachedArtifact, TextAudioEncoder

if TYPE_CHECKING:
    import torch

    from pipeline_steps.audio.log_mel import ClapFeatureConfig

STORED_RATE = 48_000
KEY = "embed.clap"
TEXT_BATCH = 16
"""Texts of a forward pass; a smaller batch is padded."""
MAX_TOKENS = 77
"""Tokens that the published checkpoints were trained with; longer texts are cut."""
TOKEN_STEP = 4
"""Texts are padded to a multiple of this many tokens."""
GPU_WINDOW_BATCH = 64
"""Windows of a forward pass on a GPU; a smaller batch is padded."""

Device = Literal["auto", "cpu", "cuda"]
Backend = Literal["torch", "openvino", "openvino-int8"]
FLOAT_LAYERS = "audio_projection"
"""Layers that stay in float32: the last two, which cost little and which all comparisons of vectors depend on."""


def read_front_end(folder: Path) -> ClapFeatureConfig:
    """Front-end described by preprocessor_config.json or, since transformers 5, by processor_config.json.

    Raises:
        IntegrityError: neither file exists, or it describes a front-end that is not supported.
    """
    from pipeline_steps.audio.log_mel import ClapFeatureConfig, Padding

    for name in ("preprocessor_config.json", "processor_config.json"):
        if not (folder / name).is_file():
            continue
        settings = json.loads((folder / name).read_text(encoding="utf-8"))
        settings = settings.get("feature_extractor", settings)
        if "fft_window_size" not in settings:
            continue
        if settings.get("top_db") is not None:
            raise IntegrityError(f"{folder / name}: top_db is set, which is not supported", "remove it")
        padding: Padding = settings.get("padding") or "repeatpad"
        if padding not in get_args(Padding):
            raise IntegrityError(f"{folder / name}: padding {padding!r} is not supported", "use repeatpad")
        return ClapFeatureConfig(
            sample_rate=int(settings["sampling_rate"]),
            seconds=float(settings["max_length_s"]),
            fft=int(settings["fft_window_size"]),
            hop=int(settings["hop_length"]),
            bands=int(settings["feature_size"]),
            low=float(settings["frequency_min"]),
            high=float(settings["frequency_max"]),
            scale="htk" if settings.get("truncation") == "fusion" else "slaney",
            padding=padding,
        )
    raise IntegrityError(f"{folder}: preprocessor_config.json is missing", "fetch the checkpoint again, with all its files")


class ClapEncoderConfig(StageConfig):
    """Group `embed.clap`."""

    model: str = Field(default="", max_length=500, description="hub id or local folder")
    revision: str = Field(
        default="", max_length=64, description="commit (40 hex digits) of a hub id; sha256 of a folder (64), checked when given"
    )
    device: Device = Field(default="auto", description="auto: a GPU if there is one and the backend is torch")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(default="auto", description="auto: bfloat16 on GPU, float32 on CPU")
    backend: Backend = Field(default="torch", description="audio inference on a CPU: torch, openvino or openvino-int8")
    min_int8_recall: float = Field(
        default=0.99, ge=0, le=1, description="recall@10 of openvino-int8 on a sample of the pool; below it float32 is used"
    )


@TEXT_AUDIO_ENCODERS.register("clap")
class ClapEncoder(HubModel, TextAudioEncoder):
    """Text-audio encoder over transformers' ClapModel. Runs no code of the checkpoint."""

    name = "clap"
    families = ("clap",)
    family = "clap"
    version = 2
    config_class: ClassVar[type[StageConfig] | None] = ClapEncoderConfig
    recorded_as: ClassVar[Mapping[str, str]] = {"dtype": "precision"}
    key: str = KEY
    max_tokens: ClassVar[int] = MAX_TOKENS

    def __init__(self, config: Any, layout: ProjectPaths) -> None:
        HubModel.__init__(self, config.model, config.revision, self.key, layout.root)
        TextAudioEncoder.__init__(self, config, layout)
        self.backend: Backend = config.backend
        self.device = resolve_device("cpu" if config.device == "auto" and self.backend != "torch" else config.device, self.key)
        if self.backend != "torch" and self.device != "cpu":
            raise ConfigError(
                f"{KEY}.backend: {self.backend} computes on the CPU only", f"set {KEY}.device to cpu, or the backend to torch"
            )
        self.dtype = resolve_dtype(config.dtype, self.device)
        self._model_config: dict[str, Any] = {}
        self._network: Any = None
        self._tokenizer: Any = None
        self._audio_forward: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.front_end: ClapFeatureConfig

    @classmethod
    def check_config(cls, config: Any) -> None:
        if not config.model:
            raise ValueError("encoder clap needs clap.model, a hub id or a folder")

    @classmethod
    def float32_config(cls, config: Any) -> tuple[Any, float] | None:
        if config.backend != "openvino-int8":
            return None
        return config.model_copy(update={"backend": "openvino"}), config.min_int8_recall

    def _accept(self, folder: Path) -> None:
        self._model_config = check_checkpoint(folder)
        if self._model_config.get("model_type") != "clap":
            raise ConfigError(
                f"{KEY}.model: {self.model} is of type {self._model_config.get('model_type')}, not clap",
                "name a ClapModel checkpoint; convert laion-clap's .pt files, or use embed.encoder laion_clap",
            )
        self.front_end = read_front_end(folder)
        bands = (self._model_config.get("audio_config") or {}).get("num_mel_bins", 64)
        if bands != self.front_end.bands:
            raise IntegrityError(f"{folder}: the model has {bands} mel bands, its front-end {self.front_end.bands}")

    @property
    def dimension(self) -> int:
        self.fetch()
        return int(self._model_config.get("projection_dim", 512))

    @property
    def parameters(self) -> dict[str, Any]:
        """Empty for a folder outside the project, whose path is not recorded."""
        if Path(self.model).is_absolute():
            return {}
        return {"model": self.model, "revision": self.revision, "precision": self.dtype, "backend": self.backend}

    def meta(self) -> dict[str, Any]:
        return {"space": "@".join([self.name, *self.identity.values()]), "encoder": self.name}

    def describe_texts(self) -> dict[str, Any]:
        shape = [TEXT_BATCH, TOKEN_STEP, self.max_tokens]
        return {"name": self.name, "version": self.version, **self.identity, "precision": self.dtype, "shape": shape}

    def describe_audio(self) -> dict[str, Any]:
        network = {"name": self.name, "version": self.version, **self.identity}
        described = {**network, "precision": self.dtype, "backend": self.backend}
        return {**described, "int8": self.describe_int8()} if self.backend == "openvino-int8" else described

    def describe_int8(self) -> dict[str, Any]:
        """Everything that shapes the quantized network."""
        return {**self.identity, "calibration": int8_calibration.VERSION, "exact": FLOAT_LAYERS}

    def describe(self) -> dict[str, Any]:
        return {"family": self.family, "texts": self.describe_texts(), "sounds": self.describe_audio()}

    def load(self) -> Self:
        """Load tokenizer and weights; a second call does nothing.

        Raises:
            ConfigError: the extra that the backend needs is not installed.
            IntegrityError: weights are missing or have another shape than the configuration says.
        """
        if self._network is None:
            import torch
            from transformers import ClapModel

            self._load(ClapModel)
            self._audio_forward = self._forward_windows
            if self.backend == "openvino":
                from pipeline_steps.models.text_audio.openvino import ClapAudioTower, compile_model

                self._audio_forward = compile_model(ClapAudioTower(self._network), self._example(), torch.get_num_threads())
            elif self.backend == "openvino-int8":
                self._audio_forward = None  # set with the first clip: texts need no quantized network
        return self

    def _load(self, kind: Any, **options: Any) -> None:
        """Load the tokenizer, and the weights into class `kind` of transformers."""
        import torch
        from transformers import AutoTokenizer

        folder = self.fetch()
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            reason = f"{self.key}.model: no usable tokenizer: {' '.join(str(error).split())[:200]}"
            raise IntegrityError(reason, "fetch the checkpoint again, with all its files") from error
        network = load_weights(kind, folder, self.key, torch.float32, **options)
        with self._memory_guard():
            self._network = network.to(self.device).eval()

    def _memory_guard(self) -> AbstractContextManager[None]:
        return gpu_memory_guard(f"{self.key}.device, {self.key}.dtype", f"free GPU memory, or set {self.key}.device to cpu")

    def audio_artifact(self) -> CachedArtifact | None:
        """The quantized network, so that all processes use the same one; only backend openvino-int8 needs it."""
        if self.backend != "openvino-int8":
            return None
        schema = pa.schema([pa.field("network", pa.large_binary())])
        description = self.describe_int8()
        return CachedArtifact("embed-int8", "network", schema, description, self.int8_network, self.adopt_int8_network)

    def int8_network(self) -> bytes:
        """Quantize the audio tower to 8-bit integers, for `adopt_int8_network`.

        Raises:
            ConfigError: the extra `openvino` is not installed.
        """
        import torch

        from pipeline_steps.audio.log_mel import clap_log_mel
        from pipeline_steps.models.text_audio.openvino import ClapAudioTower, quantize_int8

        self.load()
        mel = self.front_end
        clips = torch.from_numpy(np.stack(list(int8_calibration.calibration_signals(mel.samples, mel.sample_rate))))
        with torch.inference_mode():
            features = [clap_log_mel(clip[None], mel)[:, None] for clip in clips]
        return quantize_int8(ClapAudioTower(self._network), self._example(), features, FLOAT_LAYERS)

    def adopt_int8_network(self, block: bytes) -> None:
        """Use the network that `int8_network` returned, in this process or another one.

        Raises:
            ConfigError: the extra `openvino` is not installed.
        """
        import torch

        from pipeline_steps.models.text_audio.openvino import load_compiled

        self._audio_forward = load_compiled(block, torch.get_num_threads())

    def _example(self) -> torch.Tensor:
        import torch

        mel = self.front_end
        return torch.zeros(1, 1, 1 + mel.samples // mel.hop, mel.bands)

    def prepare_audio(self, samples_48k: FloatArray) -> FloatArray:
        """Windows [N, T] of a clip at the checkpoint's sample rate.

        Raises:
            ValueError: the clip is empty, not one-dimensional, or holds NaN or infinity.
        """
        from pipeline_steps.audio.log_mel import split_windows

        samples = np.asarray(samples_48k, np.float32)
        self.fetch()
        rate = self.front_end.sample_rate
        samples = resample(samples, STORED_RATE, rate) if samples.size and rate != STORED_RATE else samples
        return split_windows(samples, self.front_end.samples, self.front_end.padding)

    def audio_rows(self, prepared: Sequence[FloatArray]) -> FloatArray:
        """Unit vectors [N, dimension] of the windows of N clips: the mean over the unit vectors of their windows."""
        import torch

        if not len(prepared):
            return np.zeros((0, self.dimension), np.float32)
        if self._audio_forward is None and self._network is not None:  # openvino-int8 without a network from the cache
            self.adopt_int8_network(self.int8_network())
        windows = torch.from_numpy(np.concatenate(prepared))
        batch_size = GPU_WINDOW_BATCH if self.device == "cuda" else 1
        vectors = self._batched(self._embed_windows, windows, batch_size).astype(np.float64)
        ends = np.cumsum([len(clip) for clip in prepared])
        return l2_normalize(np.stack([part.mean(0) for part in np.split(vectors, ends[:-1])]).astype(np.float32))

    def text_rows(self, texts: Sequence[str]) -> FloatArray:
        """Unit vectors [N, dimension] of texts, in batches of texts of similar length."""
        import torch

        rows = np.zeros((len(texts), self.dimension), np.float32)
        by_length: dict[int, list[int]] = {}
        ids = [self._tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"] for text in texts]
        for row, tokens in enumerate(ids):
            by_length.setdefault(-(-len(tokens) // TOKEN_STEP) * TOKEN_STEP, []).append(row)
        for length, members in sorted(by_length.items()):
            padded = torch.full((len(members), length), int(self._tokenizer.pad_token_id))
            for place, row in enumerate(members):
                padded[place, : len(ids[row])] = torch.tensor(ids[row])
            rows[members] = self._batched(self._embed_texts, padded, TEXT_BATCH)
        return l2_normalize(rows)

    def _batched(self, function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, size: int) -> FloatArray:
        """`function` of rows in batches of exactly `size`; the last batch is padded with its last row."""
        import torch

        from pipeline_steps.audio.log_mel import map_threads

        def forward(batch: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                return function(batch)

        missing = -len(rows) % size
        full = torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows
        threads = torch.get_num_threads() if self.device == "cpu" else 1
        with self._memory_guard():
            parts = map_threads(forward, [full[at : at + size] for at in range(0, len(full), size)], threads)
        return np.asarray(torch.cat(parts)[: len(rows)].float().cpu().numpy())

    def _embed_windows(self, windows: torch.Tensor) -> torch.Tensor:
        from pipeline_steps.audio.log_mel import clap_log_mel

        if self._audio_forward is None:
            raise RuntimeError("clap: call load() before use")
        return self._audio_forward(clap_log_mel(windows.to(self.device), self.front_end)[:, None])

    def _forward_windows(self, features: torch.Tensor) -> torch.Tensor:
        import torch

        longer = torch.zeros(len(features), 1, dtype=torch.bool, device=features.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            pooled: torch.Tensor = self._network.get_audio_features(input_features=features, is_longer=longer).pooler_output
        return pooled

    def _embed_texts(self, ids: torch.Tensor) -> torch.Tensor:
        import torch

        ids = ids.to(self.device)
        mask = (ids != self._tokenizer.pad_token_id).long()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            pooled: torch.Tensor = self._network.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
        return pooled
