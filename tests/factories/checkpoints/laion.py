"""Small checkpoints in the layout of laion-clap: weights, training state, and parts that the conversion drops."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline_steps.audio.log_mel import ClapFeatureConfig, clap_mel_filters
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.models.text_audio.laion_clap import LaionClapEncoder, LaionClapEncoderConfig
from tests.factories.checkpoints.clap import clap_config, randomized, roberta_tokenizer

BACK = (
    (r"^text_model\.", "text_branch."),
    (r"^audio_model\.audio_encoder\.", "audio_branch."),
    (r"_projection\.linear1\.", "_projection.0."),
    (r"_projection\.linear2\.", "_projection.2."),
    (r"^(audio_branch)\.batch_norm\.", r"\1.bn0."),
    (r"(blocks\.\d+)\.layernorm_before\.", r"\1.norm1."),
    (r"(blocks\.\d+)\.layernorm_after\.", r"\1.norm2."),
    (r"(blocks\.\d+)\.attention\.output\.dense\.", r"\1.attn.proj."),
    (r"(blocks\.\d+)\.attention\.self\.", r"\1.attn."),
    (r"(blocks\.\d+)\.intermediate\.dense\.", r"\1.mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
)


def laion_encoder(checkpoint: Path, text: Path) -> LaionClapEncoder:
    """Encoder of a checkpoint with the texts of a folder."""
    config = LaionClapEncoderConfig(checkpoint=str(checkpoint), text_model_dir=str(text))
    return LaionClapEncoder(config, ProjectPaths(Path()))


def text_folder(folder: Path) -> Path:
    """Small configuration and vocabulary of RoBERTa."""
    from transformers import RobertaConfig

    words = roberta_tokenizer()
    words.save_pretrained(folder)
    text = clap_config(len(words)).text_config
    kept = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings",
        "vocab_size", "type_vocab_size", "layer_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id",
    )  # fmt: skip
    RobertaConfig(**{name: getattr(text, name) for name in kept}).save_pretrained(folder)
    return folder


def laion_state(fused: bool = False) -> dict[str, torch.Tensor]:
    """Weights of a small network under the names of laion-clap."""
    from transformers import ClapModel

    torch.manual_seed(3)
    model = randomized(ClapModel(clap_config(len(roberta_tokenizer()), fused)), 3)
    state: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        for pattern, old in BACK:
            name = re.sub(pattern, old, name)
        if re.search(r"attn\.(key|value)\.", name):
            continue
        if ".attn.query." in name:
            source = name.replace("audio_branch.", "audio_model.audio_encoder.").replace(".attn.query.", ".attention.self.{}.")
            value = torch.cat([model.state_dict()[source.format(part)] for part in ("query", "key", "value")])
            name = name.replace(".attn.query.", ".attn.qkv.")
        state[name] = value
    state["audio_branch.logmel_extractor.melW"] = torch.from_numpy(clap_mel_filters(ClapFeatureConfig(low=50)))
    state["audio_branch.tscam_conv.bias"] = torch.ones(527)
    state["audio_transform.sequential.0.bias"] = torch.ones(24)
    return state


def laion_checkpoint(path: Path, fused: bool = False, **more: Any) -> Path:
    """Write a checkpoint as laion-clap's training does: parallel-training names, numpy numbers, optimizer state."""
    state = {f"module.{name}": value for name, value in laion_state(fused).items()}
    scores = {"epoch": 7, "name": "tiny", "best": np.float64(0.5), "optimizer": {"state": {0: {"step": 3}}, "param_groups": []}}
    torch.save({**scores, "state_dict": state, **more}, path)
    return path
