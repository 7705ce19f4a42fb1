"""Pipeline of recipe `ip_adapter`: audio to images by a frozen Stable Diffusion and an audio IP-Adapter.

The exported folder contains the trained weights and names the frozen models; small local ones are copied into it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from pipeline_steps.core.array_types import ByteArray, FloatArray
from pipeline_steps.core.atomic import atomic_path, write_json
from pipeline_steps.core.errors import DataError, IntegrityError
from pipeline_steps.diffusion.audio_prompt import AudioPrompt, blend
from pipeline_steps.diffusion.audio_tokens import AstTokenizer, AudioTokenizer, AudioTokens, TokenPooling, YamnetTokenizer
from pipeline_steps.diffusion.ip_adapter import AudioEmbeds, AudioIPAdapter
from pipeline_steps.diffusion.perceiver_resampler import PerceiverResampler
from pipeline_steps.diffusion.pipelines.base import (
    PIPELINES,
    AudioConditionedPipeline,
    GenerationConfig,
    classifier_free_guidance,
    to_uint8,
)
from pipeline_steps.diffusion.pipelines.safetensors_io import (
    FORMAT,
    INDEX,
    RETRAIN,
    check_weights,
    copy_encoder_weights,
    read_json,
    read_model_index,
    read_weights,
    write_weights,
)
from pipeline_steps.diffusion.stable_diffusion import FILES as BACKBONE_FILES
from pipeline_steps.diffusion.stable_diffusion import StableDiffusionBackbone
from pipeline_steps.models.audio.ast import AstEncoder
from pipeline_steps.models.audio.yamnet import YamNet
from pipeline_steps.models.hub_checkpoint import FILES as ENCODER_FILES

CLASS_NAME = "AudioIPAdapterPipeline"
IP_ADAPTER = "ip_adapter.safetensors"
RESAMPLER = "resampler/model.safetensors"
COPY_LIMIT = 100_000_000
"""Largest local checkpoint, in bytes, that is copied into the export."""
MODELS_VARIABLE = "SONIFY_MODELS"
"""Environment variable: folder of the local checkpoints that an export names; the default is the project of the export."""
SCHEDULERS = {"DPMSolverMultistepScheduler": DPMSolverMultistepScheduler, "DDIMScheduler": DDIMScheduler}


@PIPELINES.register(CLASS_NAME)
class AudioIPAdapterPipeline(AudioConditionedPipeline):
    """Stable Diffusion conditioned on audio.

    Args:
        adapter: in its loaded backbone.
        scheduler: diffusers scheduler whose configuration is used.
        encoder: None if the pipeline gets audio tokens.
        generation_config: default sampling parameters.
    """

    batch_size = 8  # guidance doubles it

    def __init__(
        self,
        adapter: AudioIPAdapter,
        scheduler: object,
        encoder: AudioTokenizer | None,
        generation_config: GenerationConfig,
    ) -> None:
        self.adapter = adapter.eval()
        self.scheduler = scheduler
        self.encoder = encoder
        self.generation_config = generation_config

    @classmethod
    def from_pretrained(cls, folder: Path, device: str | None = None) -> Self:
        """Load an exported folder; the default device is a GPU if there is one. On a GPU frozen weights are bfloat16."""
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if place.startswith("cuda") else torch.float32
        adapter, scheduler, encoder, index = load_adapter(folder, dtype)
        adapter.backbone.to(place)
        if dtype is torch.bfloat16:
            adapter.backbone.unet.to(memory_format=torch.channels_last)
        return cls(adapter.to(place), scheduler, encoder, GenerationConfig(**index["generation_config"]))

    @property
    def has_text_encoder(self) -> bool:
        """Whether the backbone has a text encoder."""
        return self.adapter.backbone.has_text_encoder

    @property
    def device(self) -> torch.device:
        """Device of the adapter."""
        return self.adapter.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape [C, h, w] of the latents of one image."""
        backbone = self.adapter.backbone
        side = self.generation_config.resolution // backbone.stride
        return backbone.channels, side, side

    @property
    def families(self) -> frozenset[str]:
        """Model families of the audio encoder, the tagger and the text encoder."""
        backbone = self.adapter.backbone
        text = {backbone.text_family} if backbone.has_text_encoder else set()
        return frozenset(text | (self.encoder.families if self.encoder is not None else set()))

    def encode_audio(self, samples_48k: FloatArray) -> AudioEmbeds:
        """Encode a mono 48 kHz clip [T]; the result can be reused for any number of images.

        Raises:
            ValueError: the clip is empty, not mono, or not finite, or the pipeline has no encoder.
        """
        if self.encoder is None:
            raise ValueError("this pipeline has no audio encoder; pass audio tokens to encode_tokens")
        return self.encode_tokens(self.encoder.tokenize([samples_48k], self.generation_config.max_seconds)[0])

    def encode_mixture(self, samples_48k: FloatArray, tracks: Sequence[FloatArray]) -> AudioEmbeds:
        """Encode a mixture; its prompt names the sources of each track, because the tags of a mixture lack most of them.

        One track gives the same as `encode_audio`. Errors as there.
        """
        encoded = self.encode_audio(samples_48k)
        if len(tracks) < 2 or self.encoder is None:
            return encoded
        seconds = self.generation_config.max_seconds
        (_, loudness), *tagged = [self.encoder.tag(samples, seconds) for samples in (samples_48k, *tracks)]
        texts = self.adapter.audio_prompt.mixture_texts(tagged, loudness)
        return replace(encoded, text=blend(texts, self.adapter.encode_prompt_on_cpu))

    @torch.no_grad()
    def encode_tokens(self, tokens: AudioTokens) -> AudioEmbeds:
        """Encode one clip. One clip per call, so that the result does not depend on padding."""
        batch = self.adapter.collate([tokens])
        return AudioEmbeds(self.adapter.encode_audio(batch.to(self.device)).cpu(), batch.text)

    def collate(self, embeds: list[AudioEmbeds]) -> AudioEmbeds:
        """Concatenate encoded clips into one batch."""
        return AudioEmbeds(torch.cat([item.embeds for item in embeds]), torch.cat([item.text for item in embeds]))

    def null_embeds(self, count: int) -> AudioEmbeds:
        """Batch of `count` placeholders for missing audio: learned embeddings and the empty prompt."""
        return AudioEmbeds(self.adapter.null_audio_embeds(count), self.adapter.encode_prompt("").expand(count, -1, -1))

    def stock_arguments(self, samples_48k: FloatArray) -> dict[str, Any]:
        """Arguments of a stock StableDiffusionPipeline with `ip_adapter.safetensors` loaded: prompt and adapter embeddings."""
        encoded, null = self.encode_audio(samples_48k), self.null_embeds(1).to("cpu")
        return {
            "prompt_embeds": encoded.text,
            "negative_prompt_embeds": null.text,
            "ip_adapter_image_embeds": [torch.cat([null.embeds, encoded.embeds])[:, None]],
        }

    def generate_from_text(
        self,
        texts: list[str],
        num_samples: int = 1,
        seed: int = 0,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
    ) -> ByteArray:
        """Generate images uint8 [N, num_samples, H, W, 3] from N texts by the backbone alone.

        Raises:
            ValueError: the backbone has no text encoder.
        """
        if not self.has_text_encoder:
            return super().generate_from_text(texts, num_samples, seed, guidance_scale, num_inference_steps)
        size = self.generation_config.resolution
        if not texts:
            return np.zeros((0, num_samples, size, size, 3), np.uint8)
        text = self.adapter.backbone.encode_prompt(texts).repeat_interleave(num_samples, 0)
        condition = AudioEmbeds(self.adapter.null_audio_embeds(len(text)), text)
        images = self._sample_scaled(condition, 0.0, num_samples, seed, guidance_scale, num_inference_steps)
        return images.reshape(len(texts), num_samples, size, size, 3)

    def generate_from_audio_and_text(
        self,
        embeds: list[AudioEmbeds],
        text: str,
        audio_scale: float,
        num_samples: int = 1,
        seed: int = 0,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
    ) -> ByteArray:
        """Generate images uint8 [N, num_samples, H, W, 3] from N encoded clips beside a text.

        The prompt embeddings of audio and text are averaged with the weights `audio_scale` and 1 - `audio_scale`.

        Raises:
            ValueError: the backbone has no text encoder.
        """
        settings = (num_samples, seed, guidance_scale, num_inference_steps)
        if not self.has_text_encoder:
            return super().generate_from_audio_and_text(embeds, text, audio_scale, *settings)
        batch = self.collate([item for item in embeds for _ in range(num_samples)]).to(self.device)
        prompt = audio_scale * batch.text + (1.0 - audio_scale) * self.adapter.encode_prompt(text)
        condition = AudioEmbeds(batch.embeds, prompt)
        images = self._sample_scaled(condition, audio_scale, *settings)
        return images.reshape(len(embeds), num_samples, *images.shape[1:])

    def _sample_scaled(
        self,
        condition: AudioEmbeds,
        audio_scale: float,
        num_samples: int,
        seed: int,
        guidance_scale: float | None,
        num_inference_steps: int | None,
    ) -> ByteArray:
        """Images uint8 of a condition with `num_samples` rows per clip or text, with a weight of the audio attention."""
        indices = list(range(num_samples)) * (len(condition) // num_samples)
        self.adapter.set_scale(audio_scale)
        try:
            return to_uint8(self.sample_images(condition, indices, seed, guidance_scale, num_inference_steps))
        finally:
            self.adapter.set_scale(1.0)

    def denoise(
        self, latents: torch.Tensor, condition: AudioEmbeds, guidance_scale: float, num_inference_steps: int
    ) -> torch.Tensor:
        """Images float [N, 3, H, W] in [-1, 1] from initial latents [N, C, h, w], in the precision of the backbone."""
        backbone = self.adapter.backbone
        with torch.autocast(self.device.type, torch.bfloat16, enabled=backbone.dtype == torch.bfloat16):
            latents = self._denoise_latents(latents, condition, guidance_scale, num_inference_steps)
        return backbone.decode(latents.float())

    def _denoise_latents(
        self, latents: torch.Tensor, condition: AudioEmbeds, guidance_scale: float, num_inference_steps: int
    ) -> torch.Tensor:
        count, text, audio = len(latents), condition.text, condition.embeds
        guided = guidance_scale not in (0.0, 1.0)
        if guidance_scale != 1.0:
            null_text = self.adapter.encode_prompt("").expand(count, -1, -1)
            null_audio = self.adapter.null_audio_embeds(count).to(audio)
            text = torch.cat([null_text, text]) if guided else null_text
            audio = torch.cat([null_audio, audio]) if guided else null_audio
        # A copy, because diffusers' schedulers count their steps.
        scheduler = type(self.scheduler).from_config(self.scheduler.config)  # type: ignore[attr-defined]
        scheduler.set_timesteps(num_inference_steps, device=latents.device)
        latents = latents * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            inputs = scheduler.scale_model_input(torch.cat([latents, latents]) if guided else latents, timestep)
            output = self.adapter.unet_forward(inputs, timestep.expand(len(inputs)), text, audio).float()
            if guided:
                unconditional, conditional = output.chunk(2)
                output = classifier_free_guidance(conditional, unconditional, guidance_scale)
            latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
        return latents


def save_adapter(folder: Path, pipeline: AudioIPAdapterPipeline, encoder: AudioTokenizer, assets: Path) -> None:
    """Write an adapter into a new folder. `model_index.json` is written last and marks the folder as complete.

    Args:
        folder: to be created.
        pipeline: adapter, scheduler and default sampling parameters.
        encoder: audio encoder that the adapter was trained with.
        assets: folder of YAMNet's weights.
    """
    adapter = pipeline.adapter
    hashes = {
        name: write_weights(folder / name, state, torch.float32)
        for name, state in ((IP_ADAPTER, adapter.ip_adapter_state_dict()), (RESAMPLER, adapter.resampler_state_dict()))
    }
    write_json(folder / "resampler/config.json", {"type": "perceiver", "settings": adapter.resampler.settings})
    scheduler: Any = pipeline.scheduler
    scheduler.save_pretrained(folder / "scheduler")
    backbone = _model_reference(adapter.backbone, BACKBONE_FILES, folder / "backbone")
    copy_encoder_weights(assets, folder / "encoder")
    reference: dict[str, Any] = {"kind": "copy"}
    if isinstance(encoder, AstTokenizer):
        ast = encoder.encoder
        reference = {**_model_reference(ast, ENCODER_FILES, folder / "ast"), "dtype": ast.precision}
    if encoder.pooling != TokenPooling():
        reference["pooling"] = asdict(encoder.pooling)
    index = {
        "_class_name": CLASS_NAME,
        "format": FORMAT,
        "audio_prompt": adapter.audio_prompt.settings(),
        "backbone": backbone,
        "encoder": {"name": encoder.name, **reference},
        "generation_config": asdict(pipeline.generation_config),
        "sha256": hashes,
    }
    write_json(folder / INDEX, index)


def _model_reference(model: StableDiffusionBackbone | AstEncoder, files: Sequence[str], target: Path) -> dict[str, str]:
    """Reference to a frozen model; a small local folder is copied to `target`."""
    folder, identity = model.fetch(), model.describe()
    if "sha256" not in identity:
        return {"kind": "hub", "model": model.model, "revision": model.revision}
    paths = sorted({path for pattern in files for path in folder.glob(pattern)})
    if sum(path.stat().st_size for path in paths) > COPY_LIMIT:
        return {"kind": "folder", "model": model.model, "revision": identity["sha256"]}
    for path in paths:
        with atomic_path(target / path.relative_to(folder)) as temporary:
            shutil.copyfile(path, temporary)
    return {"kind": "copy", "revision": identity["sha256"]}


def load_adapter(folder: Path, dtype: torch.dtype) -> tuple[AudioIPAdapter, Any, AudioTokenizer, dict[str, Any]]:
    """Adapter in its backbone (on the CPU, frozen weights of `dtype`), scheduler, encoder and index of an exported folder.

    Raises:
        DataError: the folder, a file, or a folder that the index names is missing.
        IntegrityError: a hash, key or shape differs, or a configuration is not allowed.
        ServiceError: a hub model is not cached and cannot be fetched.
    """
    index = read_model_index(folder, CLASS_NAME)
    settings = dict(read_json(folder / "resampler/config.json").get("settings", {}))
    schedule = read_json(folder / "scheduler/scheduler_config.json")
    scheduler = SCHEDULERS.get(str(schedule.get("_class_name")))
    if scheduler is None:
        raise IntegrityError(f"{folder}: unknown scheduler {schedule.get('_class_name')!r}", RETRAIN)
    backbone = StableDiffusionBackbone(**_resolve_reference(folder, "backbone", index), dtype=dtype, key="backbone").load()
    try:
        resampler = PerceiverResampler(**settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise IntegrityError(f"{folder / 'resampler/config.json'}: settings are not valid: {error}", RETRAIN) from error
    try:
        audio_prompt = AudioPrompt(**index["audio_prompt"])
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"{folder / INDEX}: audio_prompt is not valid: {error}", RETRAIN) from error
    adapter = AudioIPAdapter(backbone, resampler, audio_prompt)
    hashes = index.get("sha256", {})
    for name, state in ((IP_ADAPTER, adapter.ip_adapter_state_dict()), (RESAMPLER, adapter.resampler_state_dict())):
        tensors = read_weights(folder / name, hashes.get(name, ""))
        check_weights(folder / name, tensors, state)
        with torch.no_grad():
            for key, value in tensors.items():
                state[key].copy_(value)
    return adapter, scheduler.from_config(schedule), _load_encoder(folder, index), index


def _load_encoder(folder: Path, index: dict[str, Any]) -> AudioTokenizer:
    reference, tagger = index.get("encoder", {}), YamNet(folder / "encoder")
    pooling = TokenPooling(**reference.get("pooling", {}))
    if reference.get("name") == YamnetTokenizer.name:
        return YamnetTokenizer(tagger, tagger, pooling)
    if reference.get("name") != AstTokenizer.name:
        raise IntegrityError(f"{folder / INDEX}: unknown encoder {reference.get('name')!r}", RETRAIN)
    model = _resolve_reference(folder, "encoder", index)
    return AstTokenizer(AstEncoder(**model, precision=str(reference.get("dtype")), key="encoder"), tagger, pooling)


def _resolve_reference(folder: Path, part: str, index: dict[str, Any]) -> dict[str, Any]:
    """Arguments `model` and `revision` of a frozen model that the index refers to."""
    reference = index.get(part, {})
    revision = str(reference.get("revision", ""))
    if reference.get("kind") == "copy":
        return {"model": str(folder / ("ast" if part == "encoder" else part)), "revision": revision}
    model = str(reference.get("model", ""))
    if reference.get("kind") == "hub":
        return {"model": model, "revision": revision}
    root = Path(os.environ.get(MODELS_VARIABLE) or folder.resolve().parents[1])
    if not (root / model).is_dir():
        raise DataError(
            f"{folder / INDEX}: {part} is the folder {model} (sha256 {revision}), which is not in {root}",
            f"copy it there, or set {MODELS_VARIABLE} to the folder that contains it",
        )
    return {"model": str(root / model), "revision": revision}
