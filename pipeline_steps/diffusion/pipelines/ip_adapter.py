"""Sound in, pictures out, by a frozen backbone and an audio adapter."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from safetensors.torch import save as save_safetensors

from pipeline_steps.core.array_types import ByteArray, FloatArray
from pipeline_steps.core.atomic import atomic_path, write_bytes, write_json
from pipeline_steps.core.errors import DataError, IntegrityError
from pipeline_steps.core.hashing import sha256_bytes
from pipeline_steps.diffusion.audio_tokens import AstTokenizer, GridEncoder, YamnetTokenizer
from pipeline_steps.diffusion.ip_adapter import AudioEmbeds, AudioIPAdapter, collate_audio_tokens
from pipeline_steps.diffusion.perceiver_resampler import PerceiverResampler
from pipeline_steps.diffusion.pipelines.base import Audio2ImagePipeline, GenerationConfig, initial_latents, to_uint8
from pipeline_steps.diffusion.pipelines.safetensors_io import (
    ADAPTER_CLASS,
    FORMAT,
    INDEX,
    RETRAIN,
    check_weights,
    copy_encoder_weights,
    read_json,
    read_model_index,
    read_weights,
)
from pipeline_steps.diffusion.rectified_flow import classifier_free_guidance
from pipeline_steps.diffusion.stable_diffusion import FILES as BACKBONE_FILES
from pipeline_steps.diffusion.stable_diffusion import StableDiffusionBackbone
from pipeline_steps.models.audio.ast import AstEncoder
from pipeline_steps.models.audio.yamnet import YamNet
from pipeline_steps.models.hub_checkpoint import FILES as ENCODER_FILES

BATCH = 8
"""Pictures drawn together; guidance doubles it."""


class AudioIPAdapterPipeline(Audio2ImagePipeline):
    """`Audio2ImagePipeline` of the recipe `adapter`.

    Args:
        adapter: in its loaded backbone.
        scheduler: a diffusers scheduler whose configuration is taken.
        encoder: None if sounds come as grids.
        defaults: of drawing.
    """

    def __init__(
        self, adapter: AudioIPAdapter, scheduler: object, encoder: GridEncoder | None, defaults: GenerationConfig
    ) -> None:
        self.adapter = adapter.eval()
        self.scheduler = scheduler
        self.encoder = encoder
        self.defaults = defaults

    @classmethod
    def read(cls, folder: Path, device: str | None = None) -> AudioIPAdapterPipeline:
        """The pipeline of an exported folder; on a GPU the frozen weights are bfloat16."""
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if place.startswith("cuda") else torch.float32
        adapter, scheduler, encoder, index = load_adapter(folder, dtype)
        adapter.backbone.to(place)
        if dtype is torch.bfloat16:
            adapter.backbone.unet.to(memory_format=torch.channels_last)
        return cls(adapter.to(place), scheduler, encoder, GenerationConfig(**index["defaults"]))

    @property
    def has_text_encoder(self) -> bool:
        """Whether the backbone has a text encoder."""
        return self.adapter.backbone.has_text_encoder

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.adapter.device

    def encode_audio(self, samples_48k: FloatArray) -> AudioEmbeds:
        """Embeddings of one mono 48 kHz sound [T].

        Raises:
            ValueError: empty, not mono, or not finite.
        """
        if self.encoder is None:
            raise ValueError("this pipeline was made without an encoder: give it grids")
        return self.gather(self.encoder.grids([samples_48k], self.defaults.max_seconds)[0])

    @torch.no_grad()
    def gather(self, grid: torch.Tensor) -> AudioEmbeds:
        """Embeddings of one grid [moments, bands, width]. One a call: they do not depend on the length of others."""
        return AudioEmbeds(self.adapter.listen(collate_audio_tokens([grid]).to(self.device)).cpu())

    def stack(self, tokens: list[AudioEmbeds]) -> AudioEmbeds:
        """One batch of several sounds that were heard."""
        return AudioEmbeds(torch.cat([item.embeds for item in tokens]))

    def ip_adapter_image_embeds(self, samples_48k: FloatArray) -> list[torch.Tensor]:
        """The argument of that name for a stock StableDiffusionPipeline with `ip_adapter.safetensors` loaded: [2, 1, count,
        inner], first of no sound (for guidance), then of this one."""
        embeds = self.encode_audio(samples_48k).embeds
        return [torch.cat([self._silence(1).cpu(), embeds])[:, None]]

    def generate_from_embeds(
        self,
        tokens: AudioEmbeds,
        draws: list[int],
        seed: int = 0,
        guidance_scale: float | None = None,
        steps: int | None = None,
    ) -> ByteArray:
        """Pictures uint8 [N, size, size, 3] of N sounds; row i starts from the noise of (seed, draws[i])."""
        text = self.adapter.text(self.adapter.prompt).expand(len(tokens), -1, -1)
        return to_uint8(self.render(tokens, text, draws, seed, guidance_scale, steps))

    def generate_unconditional(self, count: int, seed: int = 0, steps: int | None = None) -> ByteArray:
        """Pictures uint8 [count, size, size, 3] drawn with no sound and no text."""
        return self.generate_from_embeds(AudioEmbeds(self._silence(count)), list(range(count)), seed, 0.0, steps)

    def generate_from_text(
        self,
        texts: list[str],
        num_samples: int = 1,
        seed: int = 0,
        guidance_scale: float | None = None,
        steps: int | None = None,
    ) -> ByteArray:
        """Pictures uint8 [N, num_samples, size, size, 3] of N texts by the backbone alone: the adapter's attention is left out.

        Raises:
            ValueError: the backbone reads no text.
        """
        if not self.has_text_encoder:
            return super().generate_from_text(texts, num_samples, seed, guidance_scale, steps)
        if not texts:
            return np.zeros((0, num_samples, self.defaults.picture_size, self.defaults.picture_size, 3), np.uint8)
        text = self.adapter.backbone.text(texts).repeat_interleave(num_samples, 0)
        self.adapter.set_scale(0.0)
        try:
            draws = list(range(num_samples)) * len(texts)
            pictures = self.render(AudioEmbeds(self._silence(len(draws))), text, draws, seed, guidance_scale, steps)
        finally:
            self.adapter.set_scale(1.0)
        return to_uint8(pictures).reshape(len(texts), num_samples, *pictures.shape[2:], 3)

    @torch.inference_mode()
    def render(
        self,
        tokens: AudioEmbeds,
        text: torch.Tensor,
        draws: list[int],
        seed: int = 0,
        guidance_scale: float | None = None,
        steps: int | None = None,
    ) -> torch.Tensor:
        """Pictures float32 [N, 3, size, size] in [-1, 1] of N sounds, each with its text tokens [N, L, width]."""
        guidance = self.defaults.guidance_scale if guidance_scale is None else guidance_scale
        count = self.defaults.steps if steps is None else steps
        backbone = self.adapter.backbone
        side = self.defaults.picture_size // backbone.stride
        pictures = []
        for start in range(0, len(draws), BATCH):
            rows = slice(start, start + BATCH)
            noise = torch.stack([initial_latents(seed, k, (backbone.channels, side, side)) for k in draws[rows]])
            given = text[rows].to(self.device), tokens.select(rows).embeds.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=backbone.dtype == torch.bfloat16):
                latents = self._denoise(noise.to(self.device), *given, guidance, count)
            pictures.append(backbone.decode(latents.float()).cpu())
        return torch.cat(pictures)

    def _silence(self, count: int) -> torch.Tensor:
        return self.adapter.resampler.silence.detach().expand(count, -1, -1)

    def _denoise(
        self, latents: torch.Tensor, text: torch.Tensor, embeds: torch.Tensor, guidance_scale: float, steps: int
    ) -> torch.Tensor:
        count = len(latents)
        if guidance_scale != 1.0:
            no_text, no_sound = self.adapter.text("").expand(count, -1, -1), self._silence(count).to(embeds)
            text, embeds = torch.cat([no_text, text]), torch.cat([no_sound, embeds])
            if guidance_scale == 0.0:
                text, embeds = no_text, no_sound
        twice = len(text) > count
        # A fresh copy: diffusers' schedulers count their own steps.
        scheduler = type(self.scheduler).from_config(self.scheduler.config)  # type: ignore[attr-defined]
        scheduler.set_timesteps(steps, device=latents.device)
        latents = latents * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            seen = scheduler.scale_model_input(torch.cat([latents, latents]) if twice else latents, timestep)
            answer = self.adapter.predict(seen, timestep.expand(len(seen)), text, embeds).float()
            if twice:
                withheld, given = answer.chunk(2)
                answer = classifier_free_guidance(given, withheld, guidance_scale)
            latents = scheduler.step(answer, timestep, latents, return_dict=False)[0]
        return latents


IP_ADAPTER = "ip_adapter.safetensors"
RESAMPLER = "resampler/model.safetensors"
COPY_LIMIT = 100_000_000
"""Bytes up to which a local folder is copied into the export."""
MODELS_VARIABLE = "SONIFY_MODELS"
"""Environment: folder in which the local folders that an export names are looked up; else the project that holds the export."""
SOLVERS = {"DPMSolverMultistepScheduler": DPMSolverMultistepScheduler, "DDIMScheduler": DDIMScheduler}


def save_adapter(
    folder: Path, adapter: AudioIPAdapter, scheduler: Any, encoder: GridEncoder, defaults: dict[str, Any], assets: Path
) -> None:
    """Write the adapter into `folder` (which must be new or scratch); `model_index.json` last, as the mark of completeness."""
    hashes: dict[str, str] = {}
    for name, state in ((IP_ADAPTER, adapter.ip_adapter()), (RESAMPLER, adapter.resampler_state_dict())):
        kept = {key: value.detach().float().cpu().contiguous() for key, value in sorted(state.items())}
        payload = save_safetensors(kept, metadata={"format": "pt"})
        hashes[name] = sha256_bytes(payload)
        write_bytes(folder / name, payload)
    write_json(folder / "resampler/config.json", {"kind": "perceiver", "settings": adapter.resampler.settings})
    scheduler.save_pretrained(folder / "scheduler")
    backbone = adapter.backbone
    named = _model_reference(backbone, BACKBONE_FILES, folder / "backbone")
    if isinstance(encoder, AstTokenizer):
        heard = {**_model_reference(encoder.encoder, ENCODER_FILES, folder / "encoder"), "precision": encoder.encoder.precision}
    else:
        copy_encoder_weights(assets, folder / "encoder")
        heard = {"kind": "copy"}
    index = {
        "_class_name": ADAPTER_CLASS,
        "format": FORMAT,
        "prompt": adapter.prompt,
        "backbone": named,
        "encoder": {"name": encoder.name, **heard},
        "defaults": defaults,
        "sha256": hashes,
    }
    write_json(folder / INDEX, index)


def _model_reference(part: StableDiffusionBackbone | AstEncoder, files: Sequence[str], target: Path) -> dict[str, str]:
    """Reference to a frozen model; a small local folder is copied to `target`."""
    folder, known = part.fetch(), part.describe()
    if "sha256" not in known:
        return {"kind": "hub", "model": part.model, "revision": part.revision}
    paths = sorted({path for pattern in files for path in folder.glob(pattern)})
    if sum(path.stat().st_size for path in paths) > COPY_LIMIT:
        return {"kind": "folder", "model": part.model, "revision": known["sha256"]}
    for path in paths:
        with atomic_path(target / path.relative_to(folder)) as temporary:
            shutil.copyfile(path, temporary)
    return {"kind": "copy", "revision": known["sha256"]}


def load_adapter(folder: Path, dtype: torch.dtype) -> tuple[AudioIPAdapter, Any, GridEncoder, dict[str, Any]]:
    """Adapter in its backbone (on the CPU, frozen weights of `dtype`), scheduler, encoder and index of an exported folder.

    Raises:
        DataError: the folder, a file, or a folder that it names is missing.
        IntegrityError: a hash, key or shape differs, or a configuration holds what it must not.
        ServiceError: a named hub model is neither in the hub's cache nor to be fetched.
    """
    index = read_model_index(folder, ADAPTER_CLASS)
    settings = dict(read_json(folder / "resampler/config.json").get("settings", {}))
    schedule = read_json(folder / "scheduler/scheduler_config.json")
    solver = SOLVERS.get(str(schedule.get("_class_name")))
    if solver is None:
        raise IntegrityError(f"{folder}: unknown scheduler {schedule.get('_class_name')!r}", RETRAIN)
    backbone = StableDiffusionBackbone(**_resolve_reference(folder, "backbone", index), dtype=dtype, key="backbone").load()
    try:
        resampler = PerceiverResampler(**settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise IntegrityError(f"{folder / 'resampler/config.json'}: settings do not make a model: {error}", RETRAIN) from error
    adapter = AudioIPAdapter(backbone, resampler, str(index.get("prompt", "")))
    hashes = index.get("sha256", {})
    for name, state in ((IP_ADAPTER, adapter.ip_adapter()), (RESAMPLER, adapter.resampler_state_dict())):
        tensors = read_weights(folder / name, hashes.get(name, ""))
        check_weights(folder / name, tensors, state)
        with torch.no_grad():
            for key, value in tensors.items():
                state[key].copy_(value)
    return adapter, solver.from_config(schedule), _encoder(folder, index), index


def _encoder(folder: Path, index: dict[str, Any]) -> GridEncoder:
    known = index.get("encoder", {})
    if known.get("name") == YamnetTokenizer.name:
        return YamnetTokenizer(YamNet(folder / "encoder"))
    if known.get("name") != AstTokenizer.name:
        raise IntegrityError(f"{folder / INDEX}: unknown encoder {known.get('name')!r}", RETRAIN)
    return AstTokenizer(
        AstEncoder(**_resolve_reference(folder, "encoder", index), precision=str(known.get("precision")), key="encoder")
    )


def _resolve_reference(folder: Path, part: str, index: dict[str, Any]) -> dict[str, Any]:
    """Arguments that name a frozen model: where it lies and what it must be."""
    known = index.get(part, {})
    revision = str(known.get("revision", ""))
    if known.get("kind") == "copy":
        return {"model": str(folder / part), "revision": revision}
    model = str(known.get("model", ""))
    if known.get("kind") == "hub":
        return {"model": model, "revision": revision}
    root = Path(os.environ.get(MODELS_VARIABLE) or folder.resolve().parents[1])
    if not (root / model).is_dir():
        raise DataError(
            f"{folder / INDEX}: {part} is the folder {model} (sha256 {revision}), which is not in {root}",
            f"put it there, or set {MODELS_VARIABLE} to the folder that holds it",
        )
    return {"model": str(root / model), "revision": revision}
