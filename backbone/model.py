"""UNet, noise scheduler and sampling. Everything is a stock diffusers component."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel

from backbone.text import HIDDEN_SIZE


def create_unet(settings: dict[str, Any], latent_channels: int, latent_size: int, seed: int) -> UNet2DConditionModel:
    """Return an untrained UNet.

    The caption conditions it twice: by cross-attention, and by an attention-pooled vector that is added to the time embedding.
    """
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=tuple(settings["block_out_channels"]),
        down_block_types=tuple(settings["down_block_types"]),
        up_block_types=tuple(settings["up_block_types"]),
        attention_head_dim=tuple(settings["attention_head_dim"]),
        layers_per_block=settings["layers_per_block"],
        norm_num_groups=settings["norm_num_groups"],
        cross_attention_dim=HIDDEN_SIZE,
        use_linear_projection=True,
        resnet_time_scale_shift="scale_shift",
        time_embedding_dim=settings["time_embedding_dim"],
        addition_embed_type="text",
        addition_embed_type_num_heads=6,
    )


def create_scheduler() -> DPMSolverMultistepScheduler:
    """Return the sampler: DPM-Solver++ on the cosine schedule with v-prediction."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        solver_order=2,
        steps_offset=1,
    )


class PooledTextOverride:
    """Gives the pooled conditioning of a UNet other token states than its cross-attention.

    Used in training only. Where the pooled conditioning gets the empty caption, cross-attention carries the condition alone.
    Adapters that add tokens to cross-attention depend on that.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.states: torch.Tensor | None = None
        original = unet.get_aug_embed

        def get_aug_embed(
            emb: torch.Tensor, encoder_hidden_states: torch.Tensor, added_cond_kwargs: dict[str, Any]
        ) -> torch.Tensor:
            states = encoder_hidden_states if self.states is None else self.states
            embedding: torch.Tensor = original(emb=emb, encoder_hidden_states=states, added_cond_kwargs=added_cond_kwargs)
            return embedding

        unet.get_aug_embed = get_aug_embed


@torch.no_grad()
def sample_latents(
    unet: UNet2DConditionModel,
    states: torch.Tensor,
    empty: torch.Tensor,
    seeds: Sequence[int],
    guidance_scale: float,
    num_inference_steps: int,
) -> torch.Tensor:
    """Return latents [n, channels, size, size] for token states [n, tokens, width], one seed each."""
    scheduler = create_scheduler()
    scheduler.set_timesteps(num_inference_steps)
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    latents = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(int(s))) for s in seeds]).to(
        states.device
    )
    both = torch.cat([empty.expand_as(states), states])
    for timestep in scheduler.timesteps:
        prediction = unet(torch.cat([latents, latents]), timestep, both).sample.float()
        unconditional, conditional = prediction.chunk(2)
        guided = unconditional + guidance_scale * (conditional - unconditional)
        latents = scheduler.step(guided, timestep, latents).prev_sample
    return latents


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Return uint8 images [n, size, size, 3]."""
    images: torch.Tensor = vae.decode(latents / vae.config.scaling_factor).sample
    return images.add(1).mul(127.5).clamp(0, 255).round().byte().permute(0, 2, 3, 1).cpu()
