"""Processor of a vision-language checkpoint for images only, with Pillow: equal pixels with and without torchvision."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pipeline_steps.core.errors import ConfigError

KEY = "caption.vlm.model"
MODEL_TYPES = (
    "gemma3",
    "gemma4",
    "idefics3",
    "internvl",
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_5",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
)
"""Supported values of `model_type` in `config.json`; each is tested. Other types need torchvision, code of the checkpoint, or
another prompt format."""


def check_model_type(model_type: str) -> None:
    """Raise ConfigError if the type of a checkpoint is not supported."""
    if model_type not in MODEL_TYPES:
        raise ConfigError(
            f"{KEY}: model type {model_type!r} is not supported; supported are {', '.join(MODEL_TYPES)}",
            "choose a checkpoint of one of these types, or serve the model and set caption.captioner to openai_server",
        )


def load_processor(folder: Path, model_type: str) -> Any:
    """Load tokenizer (left padding), Pillow image processor and chat template as transformers' own processor class.

    Raises:
        ConfigError: a file or a required package is missing, or the checkpoint has no chat template.
    """
    import transformers
    from transformers import AutoImageProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    processor_class = getattr(transformers, PROCESSOR_MAPPING_NAMES[model_type])
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it recommends torchvision once per model class
    try:
        parts: dict[str, Any] = {
            "image_processor": AutoImageProcessor.from_pretrained(folder, backend="pil", **local),
            "tokenizer": AutoTokenizer.from_pretrained(folder, padding_side="left", **local),
            "video_processor": _UnusedPart(),
            "feature_extractor": _UnusedPart(),
        }
        settings, _ = processor_class.get_processor_dict(folder, local_files_only=True)
        image_class = _for_images_only(processor_class)
        processor = image_class.from_args_and_dict([parts[part] for part in image_class.get_attributes()], settings)
    except (ImportError, OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{KEY}: the processor cannot be loaded: {' '.join(str(error).split())[:300]}",
            "install the package it names, or use a folder with preprocessor_config.json, tokenizer.json and "
            "chat_template.jinja",
        ) from error
    finally:
        logger.setLevel(level)
    if not getattr(processor, "chat_template", None):
        processor.chat_template = getattr(processor.tokenizer, "chat_template", None)
    if not processor.chat_template:
        raise ConfigError(f"{KEY}: the checkpoint has no chat template", "choose an instruction-tuned model")
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    processor.tokenizer.padding_side = "left"
    return processor


class _UnusedPart(dict[str, Any]):
    """In place of the video processor and the audio feature extractor, with the attributes that processors read from them.

    A dict, because processors serialize their parts.
    """

    num_frames = 0
    fps = 0
    sampling_rate = 16_000


def _for_images_only(processor_class: Any) -> Any:
    """Subclass of a processor that accepts unused parts; the real ones require torchvision or a configuration for audio."""

    def check(self: Any, name: str, argument: Any) -> Any:
        if isinstance(argument, _UnusedPart):
            return None
        return processor_class.check_argument_for_proper_class(self, name, argument)

    overrides = {"check_argument_for_proper_class": check, "__init__": processor_class.__init__}
    return type(processor_class.__name__, (processor_class,), overrides)
