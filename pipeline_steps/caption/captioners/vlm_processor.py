"""Processor of a vision-language checkpoint for images only, with Pillow: equal pixels with and without torchvision."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pipeline_steps.core.errors import ConfigError

KEY = "caption.vlm.model"


def load_processor(folder: Path, model_type: str) -> Any:
    """Load tokenizer (left padding), Pillow image processor and chat template as transformers' own processor class.

    Raises:
        ConfigError: transformers has no processor for the model type, a required package is missing, or the checkpoint has no
            chat template.
    """
    import transformers
    from transformers import AutoImageProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
    from transformers.processing_utils import ProcessorMixin

    name = PROCESSOR_MAPPING_NAMES.get(model_type)
    processor_class = getattr(transformers, name, None) if name else None
    if processor_class is None or not issubclass(processor_class, ProcessorMixin):
        raise ConfigError(
            f"{KEY}: transformers has no processor for model type {model_type!r}", "choose an image-text-to-text model"
        )
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it recommends torchvision once per model class
    try:
        parts: dict[str, Any] = {
            "image_processor": AutoImageProcessor.from_pretrained(folder, backend="pil", **local),
            "tokenizer": AutoTokenizer.from_pretrained(folder, padding_side="left", **local),
            "video_processor": _DummyVideoProcessor(),
        }
        settings, _ = processor_class.get_processor_dict(folder, local_files_only=True)
        image_class = _without_video_check(processor_class)
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


class _DummyVideoProcessor(dict[str, Any]):
    """Attributes that processors read from their video processor; a dict, because processors serialize their parts."""

    num_frames = 0
    fps = 0


def _without_video_check(processor_class: Any) -> Any:
    """Subclass of a processor that accepts the dummy video processor; the real one requires torchvision."""

    def check(self: Any, name: str, argument: Any) -> Any:
        return None if name == "video_processor" else processor_class.check_argument_for_proper_class(self, name, argument)

    overrides = {"check_argument_for_proper_class": check, "__init__": processor_class.__init__}
    return type(processor_class.__name__, (processor_class,), overrides)
