"""Text-to-image backbone: a small latent diffusion model in the stock diffusers layout, with its data and training recipe."""
