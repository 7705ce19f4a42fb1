"""Vision-language checkpoints of true architecture and tiny size: real configurations and processors, own tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
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


def tokenizer(image: str, *special: str, **named: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE tokenizer with the special tokens of a family; `named` are attributes, e.g. boi_token.

    With a `bos_token`, the tokenizer begins every text with it, as those of Gemma and Llama do.
    """
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    kept = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", *dict.fromkeys((image, *special, *named.values()))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=kept, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    words.train_from_iterator(TEXTS * 4, trainer)
    bos = named.pop("bos_token", None)
    if bos:
        words.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, kept.index(bos))])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<|pad|>", eos_token="<|end|>", bos_token=bos,
        extra_special_tokens={"image_token": image, **named},
    )  # fmt: skip
    return fast


def save(folder: Path, model: Any, images: Any, words: Any, image: str, settings: dict[str, Any], suffix: str = "") -> Path:
    """Write a checkpoint in the layout of published checkpoints.

    Args:
        folder: created.
        model, images, words: network, image processor, tokenizer.
        image: text of an image in a prompt.
        settings: of `processor_config.json`.
        suffix: of the image processor's class in `preprocessor_config.json`; many published files have "Fast".
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config.eos_token_id = words.eos_token_id
    model.save_pretrained(folder)
    images.save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    named = {"image_processor_type": type(images).__name__.removesuffix("Pil") + suffix}
    path.write_text(json.dumps({**json.loads(path.read_text()), **named, **settings}))
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
        "vocab_size": len(words), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
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
    model.resize_token_embeddings(output_width(words), mean_resizing=False)
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


def small_text(kind: str, words: Any, **more: Any) -> dict[str, Any]:
    """Settings of a small language model."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id, "bos_token_id": None}
    return {"model_type": kind, "vocab_size": output_width(words), "num_key_value_heads": 2, **size, **ends, **more}


def small_vision(**more: Any) -> dict[str, Any]:
    """Settings of a small vision tower."""
    return {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, **more}


def qwen3_vl(folder: Path) -> Path:
    return _qwen3(folder, "Qwen3VL", "qwen3_vl_text")


def talkative_qwen3_vl(folder: Path) -> Path:
    """As `talkative_qwen2_5_vl`."""
    return _qwen3(folder, "Qwen3VL", "qwen3_vl_text", seed=9)


def qwen3_vl_moe(folder: Path) -> Path:
    return _qwen3(folder, "Qwen3VLMoe", "qwen3_vl_moe_text", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)


def qwen3_5(folder: Path) -> Path:
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    return _qwen3(folder, "Qwen3_5", "qwen3_5_text", layer_types=["linear_attention", "full_attention"], **linear)


def _qwen3(folder: Path, name: str, text: str, seed: int | None = None, **more: Any) -> Path:
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    torch.manual_seed(4)
    special = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    words = tokenizer(*special)
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_theta": 10000.0}
    ids = dict(zip(("image", "video", "vision_start", "vision_end"), words.convert_tokens_to_ids(list(special)), strict=True))
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32, "num_heads": 2, "patch_size": 16,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(
        text_config=small_text(text, words, head_dim=16, rope_parameters=rope, max_position_embeddings=4096, **more),
        vision_config=vision, **{f"{part}_token_id": number for part, number in ids.items()},
    )  # fmt: skip
    side = 64 if seed is None else 256
    images = Qwen2VLImageProcessorPil(patch_size=16, min_pixels=32 * 32, max_pixels=side * side)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    if seed is not None:
        randomized(model, seed)
        with torch.no_grad():
            for part, weight in model.named_parameters():
                if part.endswith("q_norm.weight"):
                    weight.mul_(4)  # sharp attention: else all pictures are one mean among the words of the prompt
    settings = {"processor_class": "Qwen3VLProcessor"}
    made = save(folder, model, images, words, "<|vision_start|><|image_pad|><|vision_end|>", settings, "Fast")
    template = (made / "chat_template.jinja").read_text()
    (made / "chat_template.json").write_text(json.dumps({"chat_template": template}))  # the only form in the published files
    (made / "chat_template.jinja").unlink()
    return made


def idefics3(folder: Path) -> Path:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    torch.manual_seed(5)
    words = tokenizer("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    config = Idefics3Config(
        text_config=small_text("llama", words), vision_config=small_vision(image_size=28, patch_size=7), scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"), pad_token_id=words.pad_token_id,
    )  # fmt: skip
    images = Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    settings = {"processor_class": "Idefics3Processor", "image_seq_len": 4}
    return save(folder, Idefics3ForConditionalGeneration(config), images, words, "<image>", settings)


def llava_onevision(folder: Path) -> Path:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    torch.manual_seed(6)
    words = tokenizer("<image>", "<video>")
    vision = small_vision(model_type="siglip_vision_model", image_size=28, patch_size=7, vision_use_head=False)
    pinpoints = [[28, 28], [28, 56], [56, 28], [56, 56]]
    config = LlavaOnevisionConfig(
        text_config=small_text("qwen2", words), vision_config=vision, image_grid_pinpoints=pinpoints,
        image_token_index=words.convert_tokens_to_ids("<image>"), video_token_index=words.convert_tokens_to_ids("<video>"),
    )  # fmt: skip
    images = LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints)
    settings = {"processor_class": "LlavaOnevisionProcessor", "num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    return save(folder, LlavaOnevisionForConditionalGeneration(config), images, words, "<image>", settings)


def llava_next(folder: Path) -> Path:
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    torch.manual_seed(7)
    words = tokenizer("<image>")
    vision = small_vision(model_type="clip_vision_model", image_size=28, patch_size=14, projection_dim=32)
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    config = LlavaNextConfig(
        text_config=small_text("mistral", words), vision_config=vision, image_grid_pinpoints=pinpoints,
        image_token_index=words.convert_tokens_to_ids("<image>"), vision_feature_layer=-1,
    )  # fmt: skip
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    images = LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints, **size)
    settings = {"processor_class": "LlavaNextProcessor", "patch_size": 14, "vision_feature_select_strategy": "default"}
    settings["num_additional_image_tokens"] = 1
    return save(folder, LlavaNextForConditionalGeneration(config), images, words, "<image>", settings)


def internvl(folder: Path) -> Path:
    from transformers import InternVLConfig, InternVLForConditionalGeneration
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    torch.manual_seed(8)
    named = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }  # fmt: skip
    words = tokenizer("<IMG_CONTEXT>", **named)
    config = InternVLConfig(
        text_config=small_text("qwen2", words), vision_config=small_vision(image_size=[28, 28], patch_size=[7, 7]),
        image_seq_length=4, image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )  # fmt: skip
    images = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=3)
    settings = {"processor_class": "InternVLProcessor", "image_seq_length": 4}
    return save(folder, InternVLForConditionalGeneration(config), images, words, "<IMG_CONTEXT>\n", settings, "Fast")


GEMMA = {"bos_token": "<bos>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}


def gemma3(folder: Path) -> Path:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    torch.manual_seed(9)
    words = tokenizer("<image_soft_token>", **GEMMA)
    text = small_text("gemma3_text", words, head_dim=16, layer_types=["sliding_attention", "full_attention"])
    config = Gemma3Config(
        text_config=text, vision_config=small_vision(model_type="siglip_vision_model", image_size=28, patch_size=7),
        mm_tokens_per_image=4, image_token_index=words.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=words.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=words.convert_tokens_to_ids("<end_of_image>"),
    )  # fmt: skip
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    settings = {"processor_class": "Gemma3Processor", "image_seq_length": 4}
    made = save(folder, Gemma3ForConditionalGeneration(config), images, words, "<start_of_image>", settings)
    return begin_with_bos(made)


def begin_with_bos(folder: Path) -> Path:
    """The template writes the first token itself, as those of Gemma do."""
    path = folder / "chat_template.jinja"
    path.write_text("{{ bos_token }}" + path.read_text())
    return folder


def gemma4(folder: Path) -> Path:
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    torch.manual_seed(10)
    audio = {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
    words = tokenizer("<|image|>", "<|video|>", **GEMMA, **audio)
    text = small_text(
        "gemma4_text", words, head_dim=16, global_head_dim=16, layer_types=["sliding_attention", "full_attention"],
        vocab_size_per_layer_input=output_width(words), hidden_size_per_layer_input=8, max_position_embeddings=4096,
    )  # fmt: skip
    ids = {
        name: words.convert_tokens_to_ids(token)
        for name, token in (
            ("image_token_id", "<|image|>"), ("video_token_id", "<|video|>"), ("audio_token_id", "<|audio|>"),
            ("boi_token_id", "<start_of_image>"), ("eoi_token_id", "<end_of_image>"), ("boa_token_id", "<|audio>"),
            ("eoa_token_index", "<audio|>"),
        )
    }  # fmt: skip
    vision = small_vision(num_key_value_heads=2, head_dim=16, patch_size=4, position_embedding_size=256)
    config = Gemma4Config(text_config=text, vision_config=vision, audio_config=None, **ids)
    images = Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70, pooling_kernel_size=3)
    model = Gemma4ForConditionalGeneration(config)
    return begin_with_bos(save(folder, model, images, words, "<|image|>", {"processor_class": "Gemma4Processor"}))


FAMILIES = {
    "gemma3": gemma3, "gemma4": gemma4, "idefics3": idefics3, "internvl": internvl, "llava": llava, "llava_next": llava_next,
    "llava_onevision": llava_onevision, "qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl, "qwen3_vl_moe": qwen3_vl_moe, "qwen3_5": qwen3_5, "smolvlm": smolvlm,
}  # fmt: skip
