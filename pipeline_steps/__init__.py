"""Seeing Sound: image-audio pairs from unrelated collections, and an audio-to-image diffusion model trained on them."""

__version__ = "0.2.0"
