"""Vision-language checkpoints of true architecture and tiny size: real configurations and processors, own tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.factories.checkpoints.clap import randomized

TEXTS = [
    '{"events":[{"sound":"a dog barking","source":"dog","visible":true,"distance":"near","salience":8,"likelihood":9}]}',
    '{"events":[]} yes no Yes No rain on a tin roof, distant traffic humming, far wind in trees',
]
TEMPLATE = (
    "{% for message in messages %}{{ '<|user|>' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'IMAGE' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tokenizer(image: str, *special: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the special tokens of a family."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    kept = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", *dict.fromkeys((image, *special))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=kept, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    words.train_from_iterator(TEXTS * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<|pad|>", eos_token="<|end|>", extra_special_tokens={"image_token": image}
    )
    return fast


def save(folder: Path, model: Any, images: Any, words: Any, image: str, settings: dict[str, Any]) -> Path:
    """Write a checkpoint in the layout of published checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config.eos_token_id = words.eos_token_id
    model.save_pretrained(folder)
    images.save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("IMAGE", image))
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return folder


def output_width(words: Any) -> int:
    """Scores per position: published models pad their vocabulary to a round number above the tokenizer's."""
    return 64 * (len(words) // 64 + 2)


def llava(folder: Path, full_size: bool = False) -> Path:
    """LLaVA; at full size CLIP ViT-L/14 at 336 px with the 1.1-billion Llama of TinyLlama, in bfloat16."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(1)
    words = tokenizer("<image>")
    see = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    read = {"vocab_size": output_width(words), "num_key_value_heads": 2, **see}
    if full_size:
        see = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        read = {
            "vocab_size": 32_000, "num_key_value_heads": 4, "hidden_size": 2048, "intermediate_size": 5632,
            "num_hidden_layers": 22, "num_attention_heads": 32,
        }  # fmt: skip
    side = 336 if full_size else 28
    vision = CLIPVisionConfig(**see, image_size=side, patch_size=14)
    text = LlamaConfig(**read, pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id, bos_token_id=None)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2 if full_size else -1,
    )  # fmt: skip
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = LlavaProcessor(images, words, 14, "default", num_additional_image_tokens=1)
    processor.chat_template = TEMPLATE.replace("IMAGE", "<image>")
    model = LlavaForConditionalGeneration(config).to(torch.bfloat16 if full_size else torch.float32)
    model.generation_config.eos_token_id = words.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)  # transformers 5 writes the image processor into processor_config.json
    return folder


def qwen2_vl(folder: Path) -> Path:
    return _qwen(folder, "2")


def qwen2_5_vl(folder: Path) -> Path:
    return _qwen(folder, "2_5")


def talkative_qwen2_5_vl(folder: Path) -> Path:
    """With weights so large that what it says depends on the picture, and is seldom that there is nothing to hear."""
    return _qwen(folder, "2_5", seed=5)


def _qwen(folder: Path, generation: str, seed: int | None = None) -> Path:
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    torch.manual_seed(2)
    words = tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    name = {"2": "Qwen2VL", "2_5": "Qwen2_5_VL"}[generation]
    vision = {
        "2": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14},
        "2_5": {
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32, "num_heads": 2, "patch_size": 14,
            "fullatt_block_indexes": [1], "window_size": 56,
        },
    }[generation]  # fmt: skip
    text = {
        "vocab_size": output_width(words), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        "pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id, "bos_token_id": None,
    }  # fmt: skip
    ids = {
        f"{part}_token_id": words.convert_tokens_to_ids(token)
        for part, token in (
            ("image", "<|image_pad|>"), ("video", "<|video_pad|>"), ("vision_start", "<|vision_start|>"),
            ("vision_end", "<|vision_end|>"),
        )
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, **ids)
    images = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    if seed is not None:
        randomized(model, seed)
    settings = {"processor_class": f"{name}Processor"}
    return save(folder, model, images, words, "<|vision_start|><|image_pad|><|vision_end|>", settings)


def smolvlm(folder: Path) -> Path:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    torch.manual_seed(3)
    words = tokenizer("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    text = {
        "model_type": "llama", "vocab_size": output_width(words), "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": words.pad_token_id,
        "eos_token_id": words.eos_token_id, "bos_token_id": None,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 7,
    }  # fmt: skip
    config = SmolVLMConfig(
        text_config=text, vision_config=vision, scale_factor=2, image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=words.pad_token_id,
    )  # fmt: skip
    images = SmolVLMImageProcessorPil(size={"longest_edge": 28}, max_image_size={"longest_edge": 28}, do_image_splitting=False)
    settings = {"processor_class": "SmolVLMProcessor", "image_seq_len": 4}
    return save(folder, SmolVLMForConditionalGeneration(config), images, words, "<image>", settings)


FAMILIES = {"llava": llava, "qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl, "smolvlm": smolvlm}
