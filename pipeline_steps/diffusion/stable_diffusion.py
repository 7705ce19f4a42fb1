"""A frozen text-to-image model of the Stable Diffusion 1.5 class: any folder in the diffusers layout with a
`UNet2DConditionModel`, an `AutoencoderKL`, a scheduler and, where it reads text, a CLIP text encoder (Rombach et al. 2022,
arXiv 2112.10752). Weights from safetensors alone, no code of the checkpoint; nothing here is ever trained."""

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
"""What is fetched, hashed and copied of a checkpoint: its full-precision weights, never a variant or a pickle."""
PREDICTIONS = ("epsilon", "v_prediction")
FOREIGN = ("encoder_hid_dim_type", "addition_embed_type", "class_embed_type", "time_cond_proj_dim")
"""Settings of a U-Net that want inputs beside noisy latents, a time and text: SDXL, Kandinsky, consistency models."""

Solver = Literal["dpm++", "ddim"]


class StableDiffusionBackbone(HubModel):
    """The frozen model. Not a torch module on purpose: what holds it neither trains, saves nor averages it.

    Args:
        model: hub id or local folder.
        revision: commit of a hub id; sha256 of a folder, checked when given.
        dtype: of the U-Net's frozen weights; autoencoder and text encoder stay in float32.
        key: of params.yaml, for messages.
        root: folder that a relative `model` may lie in.
    """

    files = FILES

    def __init__(
        self,
        model: str,
        revision: str = "",
        dtype: torch.dtype = torch.float32,
        key: str = "train.backbone",
        root: Path = Path(),
    ) -> None:
        super().__init__(model, revision, key, root)
        self.dtype = dtype
        self.device = torch.device("cpu")
        self._text: Any = None
        self._tokenizer: Any = None
        self.unet: Any = None
        self.vae: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> StableDiffusionBackbone:
        """Itself: an averaged copy of a model that holds it needs no second frozen one."""
        return self

    def _accept(self, folder: Path) -> None:
        def refuse(why: str) -> None:
            raise ConfigError(
                f"{self.key}.model: {self.model}: {why}", "name a Stable Diffusion 1.x or 2.x text-to-image model"
            )

        for part in ("unet", "vae", "scheduler"):
            if not (folder / part).is_dir():
                raise IntegrityError(f"{folder}: {part}/ is missing", "name a folder in the diffusers layout")
        unet, vae = check_checkpoint(folder / "unet"), check_checkpoint(folder / "vae")
        reject_remote_code(folder / "scheduler")
        schedule = json.loads((folder / "scheduler/scheduler_config.json").read_text(encoding="utf-8"))
        if unet.get("_class_name") != "UNet2DConditionModel" or vae.get("_class_name") != "AutoencoderKL":
            refuse(
                f"made of {unet.get('_class_name')} and {vae.get('_class_name')}, not UNet2DConditionModel and AutoencoderKL"
            )
        asked = [name for name in FOREIGN if unet.get(name) is not None]
        if asked:
            refuse(f"its U-Net wants more than latents, time and text ({', '.join(asked)})")
        channels = unet.get("in_channels", 4), unet.get("out_channels", 4), vae.get("latent_channels", 4)
        if len(set(channels)) != 1:
            refuse(f"latent channels of U-Net (in, out) and autoencoder are {channels}: inpainting and depth models do not fit")
        if not isinstance(unet.get("cross_attention_dim", 1280), int):
            refuse("its U-Net has several widths of cross-attention")
        if schedule.get("prediction_type", "epsilon") not in PREDICTIONS:
            refuse(f"it predicts {schedule.get('prediction_type')}, not one of {', '.join(PREDICTIONS)}")
        if (folder / "text_encoder").is_dir():
            reject_remote_code(folder / "tokenizer")
            text = check_checkpoint(folder / "text_encoder")
            if text.get("model_type") != "clip_text_model":
                refuse(f"its text encoder is a {text.get('model_type')}, not a clip_text_model")
            if text.get("hidden_size") != unet.get("cross_attention_dim"):
                refuse(f"text of width {text.get('hidden_size')}, cross-attention of {unet.get('cross_attention_dim')}")

    def describe(self) -> dict[str, str]:
        """Identity: hub id and commit, or a folder's sha256."""
        return {"name": "backbone", **self.identity}

    def load(self) -> Self:
        """Load U-Net and autoencoder (the text encoder when it is first asked); calling it again does nothing.

        Raises:
            IntegrityError: weights are missing or have another shape than the configuration says.
        """
        if self.unet is None:
            folder = self.fetch()
            self.vae = _load(AutoencoderKL, folder / "vae", self.key, torch.float32)
            self.unet = _load(UNet2DConditionModel, folder / "unet", self.key, self.dtype)
            schedule = folder / "scheduler"
            self.noise: Any = DDPMScheduler.from_pretrained(schedule, local_files_only=True)
        return self

    def to(self, device: torch.device | str) -> Self:
        """Move what is loaded."""
        self.device = torch.device(device)
        self.unet.to(self.device)
        self.vae.to(self.device)
        if self._text is not None:
            self._text.to(self.device)
        return self

    @property
    def width(self) -> int:
        """Numbers in a token that the U-Net attends to."""
        return int(self.unet.config.cross_attention_dim)

    @property
    def channels(self) -> int:
        """Of the latents."""
        return int(self.vae.config.latent_channels)

    @property
    def stride(self) -> int:
        """Pixels of a picture's side in one of its latents."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def prediction(self) -> str:
        """What the U-Net says: `epsilon` or `v_prediction`."""
        return str(self.noise.config.prediction_type)

    @property
    def has_text_encoder(self) -> bool:
        """Whether there is a text encoder."""
        return (self.fetch() / "text_encoder").is_dir()

    @torch.no_grad()
    def text(self, texts: Sequence[str]) -> torch.Tensor:
        """Tokens [N, L, width] of texts, as StableDiffusionPipeline makes them.

        Without a text encoder: one token of zeros, which the U-Net's bias-free keys and values turn into nothing.

        Raises:
            ValueError: a text for a model that reads none.
        """
        if not self.has_text_encoder:
            if any(texts):
                raise ValueError(f"{self.model} has no text encoder")
            return torch.zeros(len(texts), 1, self.width, device=self.device)
        if self._text is None:
            self._load_text()
        ids = self._tokenizer(
            list(texts),
            padding="max_length",
            max_length=self._tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        mask = ids["attention_mask"].to(self.device) if getattr(self._text.config, "use_attention_mask", False) else None
        tokens: torch.Tensor = self._text(ids["input_ids"].to(self.device), attention_mask=mask)[0]
        return tokens

    def _load_text(self) -> None:
        from transformers import CLIPTextModel, CLIPTokenizer

        folder = self.fetch()
        try:
            self._tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{self.key}.model: no usable tokenizer: {' '.join(str(error).split())[:200]}"
            raise IntegrityError(reason, "fetch the checkpoint again, with all its files") from error
        text = load_weights(CLIPTextModel, folder / "text_encoder", self.key, torch.float32)
        self._text = text.requires_grad_(False).eval().to(self.device)

    @torch.no_grad()
    def encode(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation [N, C, h, w] of the latents of pictures [N, 3, H, W] in [-1, 1], not yet scaled."""
        spread = self.vae.encode(pictures.to(self.device)).latent_dist
        return spread.mean, spread.std

    def latents(self, mean: torch.Tensor, std: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """A draw of the latents, scaled as the U-Net knows them."""
        scaled: torch.Tensor = (mean + std * noise - self._shift) * self.vae.config.scaling_factor
        return scaled

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures [N, 3, H, W] in [-1, 1] of scaled latents."""
        pictures: torch.Tensor = self.vae.decode(latents / self.vae.config.scaling_factor + self._shift).sample
        return pictures.clamp(-1, 1)

    @property
    def _shift(self) -> float:
        return float(self.vae.config.shift_factor or 0.0)

    def scheduler(self, solver: Solver) -> Any:
        """DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095) or DDIM (Song et al. 2020, arXiv 2010.02502) on the checkpoint's
        noise schedule. Latents are never clipped."""
        folder = self.fetch() / "scheduler"
        if solver == "ddim":
            return DDIMScheduler.from_pretrained(folder, local_files_only=True, clip_sample=False)
        return DPMSolverMultistepScheduler.from_pretrained(folder, local_files_only=True, algorithm_type="dpmsolver++")


def _load(kind: Any, folder: Path, key: str, dtype: torch.dtype) -> Any:
    """A frozen diffusers model with the safetensors of a checked folder.

    Raises:
        IntegrityError: damaged, or weights missing or of another shape; diffusers would leave them as drawn at random.
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
            f"{key}.model: {folder.name}: {len(absent)} weights are not in the checkpoint (first: {absent[0]})",
            "fetch it again",
        )
    return model.requires_grad_(False).eval()
