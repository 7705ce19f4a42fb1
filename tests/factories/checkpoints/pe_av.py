"""Small PE-AV checkpoints of the true classes, named as the published ones name their weights and settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.models.text_audio.pe_av import PeAvEncoder, PeAvEncoderConfig
from tests.factories.checkpoints.clap import TEXTS, roberta_tokenizer

WIDTH = 32
SIDE = 32
"""px of the image tower."""
BLOCK = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}


def settings(vocabulary: int) -> dict[str, Any]:
    """Settings of `PeAudioVideoConfig`."""
    text = {
        "model_type": "modernbert", "vocab_size": vocabulary, "hidden_size": WIDTH, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
        "cls_token_id": 0, "sep_token_id": 2,
    }  # fmt: skip
    codec = {
        "model_type": "dac", "encoder_hidden_size": 4, "hidden_size": 64, "downsampling_ratios": [2, 8, 10, 12],
        "codebook_dim": 16,
    }  # fmt: skip
    tower = {
        "model_type": "timm_wrapper", "architecture": "vit_pe_core_tiny_patch16_384", "num_classes": 24, "do_pooling": True,
        "global_pool": "map", "model_args": {"depth": 2, "embed_dim": WIDTH, "num_heads": 2, "img_size": SIDE},
        "label_names": [str(name) for name in range(24)],
    }  # fmt: skip
    audio = {"model_type": "pe_audio_encoder", "dac_config": codec, **BLOCK}
    video = {"model_type": "pe_video_encoder", "vision_config": tower, **BLOCK}
    return {"text_config": text, "audio_video_config": {"audio_config": audio, "video_config": video, **BLOCK}}


def pe_av_checkpoint(folder: Path, video: bool = False) -> Path:
    """Write a checkpoint in the layout of `facebook/pe-av-*`; without `video` it lacks the weights of the video encoder."""
    from safetensors.torch import save_file
    from transformers import PeAudioConfig, PeAudioFeatureExtractor, PeAudioModel, PeAudioVideoConfig, PeAudioVideoModel

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    words = roberta_tokenizer()
    made = settings(len(words))
    if video:
        labels = {"id2label": {str(name): str(name) for name in range(24)}, "label2id": {str(name): name for name in range(24)}}
        tower = made["audio_video_config"]["video_config"]["vision_config"]
        whole = PeAudioVideoModel(
            PeAudioVideoConfig(
                text_config=made["text_config"],
                audio_video_config={
                    **made["audio_video_config"],
                    "video_config": {**made["audio_video_config"]["video_config"], "vision_config": {**tower, **labels}},
                },
            )
        )
        spread_texts(whole.audio_model, words)
        whole.save_pretrained(folder)
    else:
        audio = made["audio_video_config"]["audio_config"]
        model = spread_texts(PeAudioModel(PeAudioConfig(text_config=made["text_config"], audio_config=audio)), words)
        weights = model.state_dict()
        named = {name if name.startswith("text_model.") else f"audio_model.{name}": weights[name] for name in weights}
        save_file({name: value.contiguous() for name, value in named.items()}, folder / "model.safetensors", {"format": "pt"})
        config = {"architectures": ["PeAudioVideoModel"], "model_type": "pe_audio_video", **made}
        (folder / "config.json").write_text(json.dumps(config))
    PeAudioFeatureExtractor().save_pretrained(folder)
    image = {"size": {"height": SIDE, "width": SIDE}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(image))
    words.save_pretrained(folder)
    return folder


def spread_texts(model: Any, words: Any) -> Any:
    """Make the text head subtract the mean that an untrained tower gives to all texts."""
    read = words(TEXTS, padding=True, return_tensors="pt")
    tower, head = model.eval().text_model, model.text_audio_head
    with torch.no_grad():
        tower.final_norm.weight.uniform_(0.2, 2.0)  # else it hardly differs from the head's own norm
        norm, tower.final_norm = tower.final_norm, torch.nn.Identity()
        hidden = tower(read["input_ids"], read["attention_mask"]).last_hidden_state[:, 0]
        tower.final_norm = norm
        normed = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=1e-6)
        head.layer_norm.bias -= normed.mean(0)
    return model


def pe_av_encoder(model: str | Path, root: Path = Path(), **more: Any) -> PeAvEncoder:
    """Encoder of a checkpoint; `more` are keys of group `embed.pe_av`."""
    return PeAvEncoder(PeAvEncoderConfig(model=str(model), **more), ProjectPaths(root))


def clips() -> list[np.ndarray]:
    """Mono clips at 48 kHz of 0.7 s, exactly 1 s, and 31 s."""
    random = np.random.default_rng(1)
    return [(0.1 * random.standard_normal(n)).astype(np.float32) for n in (33_333, 48_000, 31 * 48_000)]
