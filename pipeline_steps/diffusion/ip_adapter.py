"""Audio IP-Adapter: audio conditioning of a frozen backbone by decoupled cross-attention (Ye et al. 2023, arXiv 2308.06721).

Every cross-attention gets new keys and values for audio tokens beside those of the text. The attention is diffusers' own
`IPAdapterAttnProcessor2_0` and the projection sits where diffusers puts it (`unet.encoder_hid_proj`), so training, sampling
and stock pipelines run the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from torch import nn

from pipeline_steps.diffusion.audio_prompt import AudioPrompt
from pipeline_steps.diffusion.audio_tokens import AudioTokens
from pipeline_steps.diffusion.perceiver_resampler import PerceiverResampler, pad_audio_tokens
from pipeline_steps.diffusion.stable_diffusion import StableDiffusionBackbone
from pipeline_steps.diffusion.tensor_batch import TensorBatch

PROJECTION = {"ff.net.0.proj": "proj.0", "ff.net.2": "proj.2", "norm": "proj.3"}
"""Parts of diffusers' IPAdapterFullImageProjection -> their names in an IP-Adapter file."""


@dataclass(frozen=True, slots=True)
class AudioTokenBatch(TensorBatch):
    """Encoded clips of N samples.

    Attributes:
        grids: [N, time, bands, width] encoder tokens.
        mask: [N, time], false for padding.
        text: [N, L, width] prompt embeddings.
    """

    grids: torch.Tensor
    mask: torch.Tensor
    text: torch.Tensor


@dataclass(frozen=True, slots=True)
class AudioEmbeds(TensorBatch):
    """Condition of N images.

    Attributes:
        embeds: [N, num_queries, dim] resampler output, the `image_embeds` of an IP-Adapter.
        text: [N, L, width] prompt embeddings.
    """

    embeds: torch.Tensor
    text: torch.Tensor


class AudioIPAdapter(nn.Module):
    """Trained part of recipe `ip_adapter`: the resampler, and keys and values of every cross-attention.

    Keys start as copies of the text's and values as zeros: an untrained adapter draws what the audio prompt says. Parameters
    and state contain the adapter alone; the backbone, whose U-Net gets the attention processors, is not a submodule.

    Args:
        backbone: loaded, and not used by another adapter.
        resampler: its output width is the U-Net's `cross_attention_dim`.
        audio_prompt: makes the prompt of a clip.
    """

    def __init__(self, backbone: StableDiffusionBackbone, resampler: PerceiverResampler, audio_prompt: AudioPrompt) -> None:
        super().__init__()
        self.backbone = backbone
        self.audio_prompt = audio_prompt
        self.resampler = resampler
        processors: dict[str, Any] = {}
        unet = backbone.unet
        for name, present in unet.attn_processors.items():
            if name.endswith("attn1.processor"):
                processors[name] = present
                continue
            attention = unet.get_submodule(name.removesuffix(".processor"))
            width, width_in = attention.to_k.weight.shape
            processor: Any = IPAdapterAttnProcessor2_0(width, width_in, num_tokens=(resampler.settings["num_queries"],))
            processor.to_k_ip[0].weight.data.copy_(attention.to_k.weight)
            processor.to_v_ip[0].weight.data.zero_()
            processors[name] = processor
        unet.set_attn_processor(dict(processors))
        unet.encoder_hid_proj = MultiIPAdapterImageProjection([resampler.image_proj])
        unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
        self.attention = nn.ModuleList(part for part in processors.values() if isinstance(part, IPAdapterAttnProcessor2_0))
        self._prompt_embeds: dict[str, torch.Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.resampler.queries.device

    def encode_prompt_on_cpu(self, text: str) -> torch.Tensor:
        """Text tokens [1, L, width] on the CPU, cached by text."""
        if text not in self._prompt_embeds:
            with torch.inference_mode(False):  # the cached tensor is also used in training
                self._prompt_embeds[text] = self.backbone.encode_prompt([text]).cpu()
        return self._prompt_embeds[text]

    def encode_prompt(self, text: str) -> torch.Tensor:
        """Text tokens [1, L, width]."""
        return self.encode_prompt_on_cpu(text).to(self.device)

    def cache_prompts(self) -> None:
        """Encode the texts of any clip, so that `collate` runs no network: worker processes of a loader cannot use a GPU."""
        for text in self.audio_prompt.all_texts():
            self.encode_prompt_on_cpu(text)

    def collate(self, clips: Sequence[AudioTokens]) -> AudioTokenBatch:
        """Pad the grids of clips to one batch and add their prompt embeddings. On the CPU."""
        grids, mask = pad_audio_tokens([clip.grid for clip in clips])
        return AudioTokenBatch(grids, mask, self.audio_prompt.embed(clips, self.encode_prompt_on_cpu))

    def encode_audio(self, tokens: AudioTokenBatch, condition_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Embeddings [N, num_queries, dim]; the learned null embeddings where `condition_mask` [N] is false."""
        grids = tokens.grids.to(self.resampler.queries.dtype)
        embeds: torch.Tensor = self.resampler.resample(grids, tokens.mask, condition_mask)
        return embeds

    def null_audio_embeds(self, count: int) -> torch.Tensor:
        """Learned embeddings [count, num_queries, dim] that stand for missing audio."""
        return self.resampler.silence.detach().expand(count, -1, -1)

    def unet_forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor, embeds: torch.Tensor
    ) -> torch.Tensor:
        """U-Net output [N, C, h, w] for noisy latents at timesteps [N], text tokens [N, L, width] and audio embeddings."""
        conditions = {"image_embeds": [embeds[:, None]]}
        output: torch.Tensor = self.backbone.unet(noisy, timesteps, text, added_cond_kwargs=conditions, return_dict=False)[0]
        return output

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, tokens: AudioTokenBatch, condition_mask: torch.Tensor
    ) -> torch.Tensor:
        """U-Net output; where `condition_mask` [N] is false, audio and prompt are both dropped, as in guidance."""
        text = torch.where(condition_mask[:, None, None], tokens.text, self.encode_prompt(""))
        return self.unet_forward(noisy, timesteps, text, self.encode_audio(tokens, condition_mask))

    def set_scale(self, scale: float) -> None:
        """Set the weight of the audio attention; 0 gives the unchanged backbone."""
        processor: Any
        for processor in self.attention:
            processor.scale = [scale]

    def ip_adapter_state_dict(self) -> dict[str, torch.Tensor]:
        """Weights in IP-Adapter's layout, as `load_ip_adapter` of stock pipelines reads them.

        `image_proj.*` is the last stage of the resampler ("full" layout); `ip_adapter.{1,3,5,...}` number the cross-attentions
        in diffusers' order.
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
        """Weights that IP-Adapter's layout does not cover: the resampler without its last stage."""
        return {name: value for name, value in self.resampler.state_dict().items() if not name.startswith("image_proj.")}
