"""An AST checkpoint of true architecture and tiny size, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.factories.checkpoints.clap import randomized


def ast_checkpoint(folder: Path) -> Path:
    """Write a checkpoint in the layout of published ones: with the classifier that tokens do not need."""
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    torch.manual_seed(0)
    config = ASTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, num_labels=3)
    randomized(ASTForAudioClassification(config), 5).save_pretrained(folder)
    ASTFeatureExtractor().save_pretrained(folder)
    return folder
