"""Image towers of true architecture and tiny size: DINOv2, CLIP, SigLIP 2; random weights, published image processors."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.factories.checkpoints.clap import randomized, roberta_tokenizer


def dinov2_checkpoint(folder: Path, registers: bool = False) -> Path:
    """Write a checkpoint as `facebook/dinov2-*` look; its crop is smaller than the pictures it was trained on, as there."""
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 70, "patch_size": 14}
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**shape)) if registers else Dinov2Model(Dinov2Config(**shape))
    randomized(model, 3).save_pretrained(folder)
    BitImageProcessorPil(
        size={"shortest_edge": 48}, crop_size={"height": 42, "width": 42}, resample=3, do_convert_rgb=True,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)  # fmt: skip
    return folder


def clip_checkpoint(folder: Path, tower_alone: bool = False) -> Path:
    """Write a checkpoint as `openai/clip-vit-*` look, or its image tower with projection alone."""
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(0)
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14, "projection_dim": 24,
    }  # fmt: skip
    text = {
        "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "projection_dim": 24,
    }  # fmt: skip
    whole = randomized(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)), 4)
    if tower_alone:
        tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**vision))
        kept = {name: value for name, value in whole.state_dict().items() if name.startswith(("vision_model", "visual_proj"))}
        tower.load_state_dict(kept)
        tower.save_pretrained(folder)
    else:
        whole.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def siglip2_checkpoint(folder: Path, any_resolution: bool = False) -> Path:
    """Write a checkpoint as `google/siglip2-*` look: `model_type` siglip, or siglip2 for any resolution (`-naflex`)."""
    from transformers import Siglip2Config, Siglip2Model, SiglipConfig, SiglipModel
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    torch.manual_seed(0)
    words = roberta_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**shape, "vocab_size": len(words), "max_position_embeddings": 64, "projection_size": 32}
    if any_resolution:
        config = Siglip2Config(text_config=text, vision_config={**shape, "num_patches": 16, "patch_size": 8})
        randomized(Siglip2Model(config), 5).save_pretrained(folder)
        Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16).save_pretrained(folder)
    else:
        config = SiglipConfig(text_config=text, vision_config={**shape, "image_size": 32, "patch_size": 8})
        randomized(SiglipModel(config), 5).save_pretrained(folder)
        SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
