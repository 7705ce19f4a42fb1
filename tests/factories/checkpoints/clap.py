"""Small CLAP checkpoints of the real architecture: real configuration, own tokenizer, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.models.text_audio.clap import ClapEncoder, ClapEncoderConfig

TEXTS = [
    "a dog barking in the distance",
    "rain on a tin roof",
    "waves breaking on a beach",
    "a crowd cheering",
    "an engine idling",
]


def roberta_tokenizer() -> Any:
    """Byte-level BPE tokenizer with RoBERTa's special tokens, trained on `TEXTS`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    words.train_from_iterator(TEXTS * 4, trainer)
    words.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>", mask_token="<mask>",
        cls_token="<s>", sep_token="</s>", model_max_length=77,
    )  # fmt: skip


def randomized(model: Any, seed: int = 0) -> Any:
    """Model with new random weights and running statistics, large enough that a misplaced weight changes outputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if weight.is_floating_point() and "mask" not in name:
                noise = torch.randn(weight.shape, generator=generator)
                wide = weight.ndim > 1
                kept = noise * (1.5 / weight[0].numel() ** 0.5) if wide else 0.2 * noise + (1.0 if "norm" in name else 0.0)
                if name.endswith(("running_mean", "running_var")):  # of log mel in dB
                    kept = -30 + 5 * noise if "mean" in name else 300 + 50 * noise
                weight.copy_(kept)
    return model


def clap_config(vocabulary: int, fused: bool = False, full_size: bool = False) -> Any:
    """Configuration of the published model, or one with fewer and narrower layers."""
    from transformers import ClapConfig

    fusion = {"enable_fusion": True, "fusion_type": "aff_2d"} if fused else {}
    if full_size:
        return ClapConfig(audio_config=fusion, text_config={"vocab_size": vocabulary, "layer_norm_eps": 1e-5})
    audio = {
        "patch_embeds_hidden_size": 16, "depths": [2, 2, 2, 2], "num_attention_heads": [2, 2, 4, 4], "hidden_size": 128,
        "projection_dim": 24, **fusion,
    }  # fmt: skip
    text = {
        "vocab_size": vocabulary, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "max_position_embeddings": 90, "projection_dim": 24, "layer_norm_eps": 1e-5,
    }  # fmt: skip
    return ClapConfig(audio_config=audio, text_config=text, projection_dim=24)


def clap_encoder(model: str | Path, root: Path = Path(), **settings: Any) -> ClapEncoder:
    """Encoder of a checkpoint; `settings` are keys of group `embed.clap`."""
    return ClapEncoder(ClapEncoderConfig(model=str(model), **settings), ProjectPaths(root))


def spread_texts(model: Any, words: Any) -> Any:
    """Subtract the mean of the text vectors, which an untrained model gives to all texts alike."""
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.permutation(" ".join(TEXTS).split())[:5]) for _ in range(32)]
    read = words(texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    model.eval()
    with torch.no_grad():
        pooled = model.text_model(read["input_ids"], read["attention_mask"]).pooler_output
        model.text_projection.linear2.bias -= model.text_projection(pooled).mean(0)
    return model


def clap_checkpoint(folder: Path, fused: bool = False, full_size: bool = False, seed: int = 0) -> Path:
    """Write a checkpoint in the layout of published checkpoints."""
    from transformers import ClapFeatureExtractor, ClapModel

    torch.manual_seed(seed)
    words = roberta_tokenizer()
    spread_texts(randomized(ClapModel(clap_config(len(words), fused, full_size)), seed), words).save_pretrained(folder)
    truncation = "fusion" if fused else "rand_trunc"
    ClapFeatureExtractor(truncation=truncation, padding="repeatpad", frequency_min=50).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
