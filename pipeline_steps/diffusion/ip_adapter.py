"""Audio for a frozen backbone: new keys and values in each cross-attention, beside those of the text (decoupled
cross-attention of IP-Adapter, Ye et al. 2023, arXiv 2308.06721), and the resampler that feeds them.

The attention is diffusers' own `IPAdapterAttnProcessor2_0`, the projection sits where diffusers puts it
(`unet.encoder_hid_proj`): training, drawing and stock pipelines run the same code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from torch import nn

from pipeline_steps.diffusion.perceiver_resampler import PerceiverResampler, pad_audio_tokens
from pipeline_steps.diffusion.stable_diffusion import StableDiffusionBackbone

PROJECTION = {"ff.net.0.proj": "proj.0", "ff.net.2": "proj.2", "norm": "proj.3"}
"""Parts of diffusers' IPAdapterFullImageProjection -> their names in an IP-Adapter file."""


@dataclass(frozen=True, slots=True)
class AudioTokenBatch:
    """Encoder tokens of N sounds: grids [N, moments, bands, width] and which moments [N, moments] are the sound's own."""

    grids: torch.Tensor
    present: torch.Tensor

    def __len__(self) -> int:
        return len(self.grids)

    def to(self, device: torch.device | str) -> AudioTokenBatch:
        """The same on a device."""
        return AudioTokenBatch(self.grids.to(device), self.present.to(device))


def collate_audio_tokens(grids: list[torch.Tensor]) -> AudioTokenBatch:
    """One batch of grids [moments, bands, width] of different lengths."""
    return AudioTokenBatch(*pad_audio_tokens(grids))


@dataclass(frozen=True, slots=True)
class AudioEmbeds:
    """What the resampler makes of N sounds: embeddings [N, count, inner], an IP-Adapter's `image_embeds`."""

    embeds: torch.Tensor

    def __len__(self) -> int:
        return len(self.embeds)

    def to(self, device: torch.device | str) -> AudioEmbeds:
        """The same on a device."""
        return AudioEmbeds(self.embeds.to(device))

    def select(self, rows: list[int] | slice) -> AudioEmbeds:
        """Some of the sounds."""
        return AudioEmbeds(self.embeds[rows])


class AudioIPAdapter(nn.Module):
    """What is trained: the resampler, and keys and values of every cross-attention, which begin as copies of the text's.

    Its parameters and state are the adapter's alone; the backbone, into whose U-Net it is hung, is held from outside.

    Args:
        backbone: loaded, and of no other adapter.
        resampler: its tokens have the width of the U-Net's cross-attention.
        prompt: text beside every sound.
    """

    def __init__(self, backbone: StableDiffusionBackbone, resampler: PerceiverResampler, prompt: str = "") -> None:
        super().__init__()
        self.backbone = backbone
        self.prompt = prompt
        self.resampler = resampler
        made: dict[str, Any] = {}
        unet = backbone.unet
        for name, present in unet.attn_processors.items():
            if name.endswith("attn1.processor"):
                made[name] = present
                continue
            attention = unet.get_submodule(name.removesuffix(".processor"))
            width, width_in = attention.to_k.weight.shape
            made[name] = IPAdapterAttnProcessor2_0(width, width_in, num_tokens=(resampler.settings["count"],))
            made[name].to_k_ip[0].weight.data.copy_(attention.to_k.weight)
            made[name].to_v_ip[0].weight.data.copy_(attention.to_v.weight)
        unet.set_attn_processor(dict(made))
        unet.encoder_hid_proj = MultiIPAdapterImageProjection([resampler.image_proj])
        unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
        self.attention = nn.ModuleList(part for part in made.values() if isinstance(part, IPAdapterAttnProcessor2_0))
        self._texts: dict[str, torch.Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.resampler.queries.device

    def text(self, text: str) -> torch.Tensor:
        """Tokens [1, L, width] of a text, encoded once."""
        if text not in self._texts:
            with torch.inference_mode(False):  # kept for training, whoever asks first
                self._texts[text] = self.backbone.text([text]).cpu()
        return self._texts[text].to(self.device)

    def listen(self, sounds: AudioTokenBatch, heard: torch.Tensor | None = None) -> torch.Tensor:
        """Embeddings [N, count, inner]; where `heard` [N] is false, the learned ones of "no sound given"."""
        grids = sounds.grids.to(self.resampler.queries.dtype)
        embeds: torch.Tensor = self.resampler.resample(grids, sounds.present, heard)
        return embeds

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """The U-Net's answer [N, C, h, w] to noisy latents at timesteps [N], text tokens [N, L, width] and embeddings."""
        given = {"image_embeds": [embeds[:, None]]}
        answer: torch.Tensor = self.backbone.unet(noisy, timesteps, text, added_cond_kwargs=given, return_dict=False)[0]
        return answer

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, sounds: AudioTokenBatch, heard: torch.Tensor
    ) -> torch.Tensor:
        """As `predict`; where `heard` [N] is false both the sound and the prompt are withheld, as guidance does."""
        text = torch.where(heard[:, None, None], self.text(self.prompt), self.text(""))
        return self.predict(noisy, timesteps, text, self.listen(sounds, heard))

    def set_scale(self, scale: float) -> None:
        """Weight of the new attention; at 0 it is left out and the backbone is itself."""
        processor: Any
        for processor in self.attention:
            processor.scale = [scale]

    def ip_adapter(self) -> dict[str, torch.Tensor]:
        """Weights in IP-Adapter's layout, as `load_ip_adapter` of stock pipelines reads them.

        `image_proj.*` is the resampler's last stage ("full" layout); `ip_adapter.{1,3,5,...}` number the cross-attentions in
        diffusers' order.
        """
        state: dict[str, torch.Tensor] = {}
        for name, value in self.resampler.image_proj.state_dict().items():
            part = next(part for part in PROJECTION if name.startswith(f"{part}."))
            state[f"image_proj.{PROJECTION[part]}{name.removeprefix(part)}"] = value
        for number, processor in enumerate(self.attention):
            for name in ("to_k_ip", "to_v_ip"):
                state[f"ip_adapter.{2 * number + 1}.{name}.weight"] = getattr(processor, name)[0].weight
        return state

    def resampler_state_dict(self) -> dict[str, torch.Tensor]:
        """Weights that IP-Adapter's layout has no place for: the resampler up to the embeddings."""
        return {name: value for name, value in self.resampler.state_dict().items() if not name.startswith("image_proj.")}
