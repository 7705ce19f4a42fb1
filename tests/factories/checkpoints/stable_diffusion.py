"""Stable Diffusion checkpoints of true architecture and tiny size: own tokenizer, random weights, diffusers' own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

TEXTS = ["a dog barks", "waves on a beach", "a train passes by", "rain on a roof"]


def clip_tokenizer(folder: Path) -> Any:
    """A byte-level BPE tokenizer with CLIP's end-of-word marks and special tokens, trained on the spot."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    words = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|startoftext|>", "<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, end_of_word_suffix="</w>")
    words.train_from_iterator(TEXTS * 4, trainer)
    state = json.loads(words.to_str())["model"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(state["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in state["merges"]))
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(folder)
    return tokenizer


def bert_text_encoder(folder: Path) -> tuple[Any, Any]:
    """Tokenizer and text encoder in the layout of the embedded backbone: BERT, 16 tokens, attention mask."""
    from transformers import BertConfig, BertModel, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), model_max_length=16)
    config = BertConfig(
        vocab_size=len(words), hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        use_attention_mask=True,
    )  # fmt: skip
    return tokenizer, BertModel(config)


def small_backbone(folder: Path) -> Path:
    """Write a checkpoint like the embedded backbone: two levels of the U-Net, one layer a block, BERT, v_prediction."""
    return stable_diffusion(folder, "v_prediction", "bert", levels=2)


def stable_diffusion(folder: Path, prediction: str = "epsilon", text: str = "clip", levels: int = 4) -> Path:
    """Write a checkpoint in the layout of published ones, PNDM.

    `text` selects the text encoder: `clip`, `bert` (pooled into the time embedding too), or empty for none. With four levels
    of the U-Net a block has two layers, as in Stable Diffusion 1.5.
    """
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    pooled = {"addition_embed_type": "text", "addition_embed_type_num_heads": 2} if text == "bert" else {}
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16, 32, 32)[-levels:],
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        layers_per_block=levels // 2,
        cross_attention_dim=24,
        attention_head_dim=2,
        norm_num_groups=8,
        **pooled,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
        sample_size=64,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1,
        prediction_type=prediction,
    )  # fmt: skip
    if not text:
        unet.save_pretrained(folder / "unet")
        vae.save_pretrained(folder / "vae")
        scheduler.save_pretrained(folder / "scheduler")
        return folder
    if text == "bert":
        tokenizer, text_encoder = bert_text_encoder(folder / "tokenizer")
    else:
        tokenizer = clip_tokenizer(folder / "tokenizer")
        config = CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        text_encoder = CLIPTextModel(config)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder
