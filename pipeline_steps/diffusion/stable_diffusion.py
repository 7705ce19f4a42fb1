"""Frozen text-to-image backbone in the layout of Stable Diffusion 1.x and 2.x (Rombach et al. 2022, arXiv 2112.10752).

Any folder in the diffusers layout with a `UNet2DConditionModel`, an `AutoencoderKL`, a scheduler and optionally a text encoder
of class CLIPTextModel or BertModel. Weights are read from safetensors only; code of the checkpoint is never run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel

from pipeline_steps.core.errors import ConfigError, IntegrityError
from pipeline_steps.models.hub_checkpoint import HubModel, check_checkpoint, load_weights, reject_remote_code

FILES = (
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.json",
    "unet/diffusion_pytorch_model-*-of-*.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/*.json",
    "tokenizer/*.txt",
)
"""Files of a checkpoint that are fetched, hashed and copied: full-precision weights, no variants, no pickles."""
PREDICTIONS = ("epsilon", "v_prediction")
UNSUPPORTED_UNET_KEYS = ("encoder_hid_dim_type", "addition_embed_type", "class_embed_type", "time_cond_proj_dim")
"""U-Net settings that require inputs other than latents, time and text: SDXL, Kandinsky, consistency models."""
TEXT_ONLY = {"addition_embed_type": "text"}
"""Exception: this setting pools the text that cross-attention reads."""
TEXT_FAMILIES = {"clip_text_model": "clip", "bert": "minilm"}
"""Supported text encoders by `model_type` of their configuration, and their model family."""

SchedulerName = Literal["dpm++", "ddim"]


class StableDiffusionBackbone(HubModel):
    """Frozen text-to-image model. It is no torch module, so that its owner does not train, save or average it.

    Args:
        model: hub id or local folder.
        revision: commit of a hub id; sha256 of a folder, checked when given.
        dtype: of the U-Net's frozen weights; autoencoder and text encoder stay in float32.
        key: key of params.yaml, for error messages.
        root: folder that a relative `model` is resolved against.
    """

    files = FILES

    def __init__(
        self,
        model: str,
        revision: str = "",
        dtype: torch.dtype = torch.float32,
        key: str = "train.ip_adapter.backbone",
        root: Path = Path(),
    ) -> None:
        super().__init__(model, revision, key, root)
        self.dtype = dtype
        self.device = torch.device("cpu")
        self._text_encoder: Any = None
        self._text_type = ""
        self._tokenizer: Any = None
        self.unet: Any = None
        self.vae: Any = None

    def __deepcopy__(self, _copies: dict[int, Any]) -> StableDiffusionBackbone:
        """Return the same object: an averaged copy of its owner shares the frozen weights."""
        return self

    def _accept(self, folder: Path) -> None:
        def refuse(why: str) -> None:
            raise ConfigError(f"{self.key}.model: {self.model}: {why}", "use a Stable Diffusion 1.x or 2.x text-to-image model")

        for part in ("unet", "vae", "scheduler"):
            if not (folder / part).is_dir():
                raise IntegrityError(f"{folder}: folder {part} is missing", "use a checkpoint in the diffusers layout")
        unet, vae = check_checkpoint(folder / "unet"), check_checkpoint(folder / "vae")
        reject_remote_code(folder / "scheduler")
        schedule = json.loads((folder / "scheduler/scheduler_config.json").read_text(encoding="utf-8"))
        if unet.get("_class_name") != "UNet2DConditionModel" or vae.get("_class_name") != "AutoencoderKL":
            refuse(f"parts {unet.get('_class_name')} and {vae.get('_class_name')}, not UNet2DConditionModel and AutoencoderKL")
        unsupported = [name for name in UNSUPPORTED_UNET_KEYS if unet.get(name) not in (None, TEXT_ONLY.get(name))]
        if unsupported:
            refuse(f"its U-Net requires more than latents, time and text ({', '.join(unsupported)})")
        channels = unet.get("in_channels", 4), unet.get("out_channels", 4), vae.get("latent_channels", 4)
        if len(set(channels)) != 1:
            refuse(f"latent channels of U-Net (in, out) and autoencoder are {channels}, as in inpainting and depth models")
        if not isinstance(unet.get("cross_attention_dim", 1280), int):
            refuse("its U-Net has several cross-attention widths")
        if schedule.get("prediction_type", "epsilon") not in PREDICTIONS:
            refuse(f"it predicts {schedule.get('prediction_type')}, not one of {', '.join(PREDICTIONS)}")
        if (folder / "text_encoder").is_dir():
            reject_remote_code(folder / "tokenizer")
            text = check_checkpoint(folder / "text_encoder")
            if text.get("model_type") not in TEXT_FAMILIES:
                refuse(f"its text encoder is a {text.get('model_type')}, not one of {', '.join(TEXT_FAMILIES)}")
            self._text_type = str(text["model_type"])
            if text.get("hidden_size") != unet.get("cross_attention_dim"):
                refuse(f"text has width {text.get('hidden_size')}, cross-attention {unet.get('cross_attention_dim')}")

    def describe(self) -> dict[str, str]:
        """Identity: hub id and commit, or the sha256 of a folder."""
        return {"name": "backbone", **self.identity}

    def load(self) -> Self:
        """Load U-Net and autoencoder, once. The text encoder is loaded when it is first used.

        Raises:
            IntegrityError: weights are missing or their shapes differ from the configuration.
        """
        if self.unet is None:
            folder = self.fetch()
            self.vae = _load(AutoencoderKL, folder / "vae", self.key, torch.float32)
            self.unet = _load(UNet2DConditionModel, folder / "unet", self.key, self.dtype)
            schedule = folder / "scheduler"
            self.noise_scheduler: Any = DDPMScheduler.from_pretrained(schedule, local_files_only=True)
        return self

    def to(self, device: torch.device | str) -> Self:
        """Move the loaded networks to a device."""
        self.device = torch.device(device)
        self.unet.to(self.device)
        self.vae.to(self.device)
        if self._text_encoder is not None:
            self._text_encoder.to(self.device)
        return self

    @property
    def width(self) -> int:
        """Width of the tokens that the U-Net attends to."""
        return int(self.unet.config.cross_attention_dim)

    @property
    def channels(self) -> int:
        """Latent channels."""
        return int(self.vae.config.latent_channels)

    @property
    def stride(self) -> int:
        """Pixels per latent position."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def prediction_type(self) -> str:
        """Prediction type of the U-Net: `epsilon` or `v_prediction`."""
        return str(self.noise_scheduler.config.prediction_type)

    @property
    def has_text_encoder(self) -> bool:
        """Whether the checkpoint has a text encoder."""
        return (self.fetch() / "text_encoder").is_dir()

    @property
    def text_family(self) -> str:
        """Model family of the text encoder, which judges must not share."""
        self.fetch()
        return TEXT_FAMILIES[self._text_type]

    @torch.no_grad()
    def encode_prompt(self, texts: Sequence[str]) -> torch.Tensor:
        """Text tokens [N, L, width], equal to those of StableDiffusionPipeline.

        Without a text encoder: one token of zeros, which has no effect because keys and values have no bias.

        Raises:
            ValueError: a text is given and the model has no text encoder.
        """
        if not self.has_text_encoder:
            if any(texts):
                raise ValueError(f"{self.model} has no text encoder")
            return torch.zeros(len(texts), 1, self.width, device=self.device)
        if self._text_encoder is None:
            self._load_text_encoder()
        ids = self._tokenizer(
            list(texts),
            padding="max_length",
            max_length=self._tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        mask = (
            ids["attention_mask"].to(self.device) if getattr(self._text_encoder.config, "use_attention_mask", False) else None
        )
        tokens: torch.Tensor = self._text_encoder(ids["input_ids"].to(self.device), attention_mask=mask)[0]
        return tokens

    def _load_text_encoder(self) -> None:
        from transformers import BertModel, BertTokenizer, CLIPTextModel, CLIPTokenizer

        folder = self.fetch()
        model, tokenizer = (BertModel, BertTokenizer) if self._text_type == "bert" else (CLIPTextModel, CLIPTokenizer)
        try:
            self._tokenizer = tokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{self.key}.model: the tokenizer cannot be loaded: {' '.join(str(error).split())[:200]}"
            raise IntegrityError(reason, "fetch the checkpoint again, with all its files") from error
        text = load_weights(model, folder / "text_encoder", self.key, torch.float32)
        self._text_encoder = text.requires_grad_(False).eval().to(self.device)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation [N, C, h, w] of the unscaled latents of images [N, 3, H, W] in [-1, 1]."""
        distribution = self.vae.encode(images.to(self.device)).latent_dist
        return distribution.mean, distribution.std

    def sample_latents(self, mean: torch.Tensor, std: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Latents mean + std * noise, scaled as the U-Net expects them."""
        scaled: torch.Tensor = (mean + std * noise - self._shift) * self.vae.config.scaling_factor
        return scaled

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, H, W] in [-1, 1] of scaled latents."""
        images: torch.Tensor = self.vae.decode(latents / self.vae.config.scaling_factor + self._shift).sample
        return images.clamp(-1, 1)

    @property
    def _shift(self) -> float:
        return float(self.vae.config.shift_factor or 0.0)

    def build_scheduler(self, name: SchedulerName) -> Any:
        """DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095) or DDIM (Song et al. 2020, arXiv 2010.02502).

        The noise schedule is that of the checkpoint. Latents are never clipped.
        """
        folder = self.fetch() / "scheduler"
        if name == "ddim":
            return DDIMScheduler.from_pretrained(folder, local_files_only=True, clip_sample=False)
        return DPMSolverMultistepScheduler.from_pretrained(folder, local_files_only=True, algorithm_type="dpmsolver++")


def _load(kind: Any, folder: Path, key: str, dtype: torch.dtype) -> Any:
    """Frozen diffusers model with the safetensors of a checked folder.

    Raises:
        IntegrityError: weights are damaged, missing or of another shape. Diffusers would initialize such weights randomly.
    """
    from safetensors import SafetensorError

    try:
        model, info = kind.from_pretrained(
            folder,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = f"{key}.model: {folder.name}: the weights cannot be loaded: {' '.join(str(error).split())[:300]}"
        raise IntegrityError(reason, "fetch the checkpoint again") from error
    absent = sorted([*info["missing_keys"], *(str(name) for name in info["mismatched_keys"])])
    if absent:
        raise IntegrityError(
            f"{key}.model: {folder.name}: {len(absent)} weights are missing in the checkpoint (first: {absent[0]})",
            "fetch the checkpoint again",
        )
    return model.requires_grad_(False).eval()
