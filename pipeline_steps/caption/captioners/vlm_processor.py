"""A vision-language model's processor for pictures alone, on Pillow: the same pixels with or without torchvision."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pipeline_steps.core.errors import ConfigError


def load_processor(folder: Path, model_type: str) -> Any:
    """Tokenizer (left padding), Pillow image processor and chat template of a checkpoint, as transformers' own class.

    Raises:
        ConfigError: transformers knows no processor for it, a package it needs is missing, or there is no chat template.
    """
    import transformers
    from transformers import AutoImageProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
    from transformers.processing_utils import ProcessorMixin

    name = PROCESSOR_MAPPING_NAMES.get(model_type)
    found = getattr(transformers, name, None) if name else None
    if found is None or not issubclass(found, ProcessorMixin):
        raise ConfigError(
            f"caption.vlm.model: no processor for model type {model_type!r}", "choose an image-text-to-text model"
        )
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    quiet = logging.getLogger("transformers")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # it recommends torchvision here, once for every model it knows
    try:
        parts: dict[str, Any] = {
            "image_processor": AutoImageProcessor.from_pretrained(folder, backend="pil", **local),
            "tokenizer": AutoTokenizer.from_pretrained(folder, padding_side="left", **local),
        }
        parts["video_processor"] = _DummyVideoProcessor()
        settings, _ = found.get_processor_dict(folder, local_files_only=True)
        chosen = _for_pictures(found)
        processor = chosen.from_args_and_dict([parts[part] for part in chosen.get_attributes()], settings)
    except (ImportError, OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"caption.vlm.model: its processor cannot be loaded: {' '.join(str(error).split())[:300]}",
            "install what it names, or use a folder with preprocessor_config.json, tokenizer.json and chat_template.jinja",
        ) from error
    finally:
        quiet.setLevel(level)
    if not getattr(processor, "chat_template", None):
        processor.chat_template = getattr(processor.tokenizer, "chat_template", None)
    if not processor.chat_template:
        raise ConfigError("caption.vlm.model: the checkpoint has no chat template", "choose an instruction-tuned model")
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    processor.tokenizer.padding_side = "left"
    return processor


class _DummyVideoProcessor(dict[str, Any]):
    """What a processor may ask of a video processor although it gets no video; a dict, since processors print themselves."""

    num_frames = 0
    fps = 0


def _for_pictures(found: Any) -> Any:
    """The processor class, content with a stand-in for its video processor: that one needs torchvision and is never used."""

    def check(self: Any, name: str, argument: Any) -> Any:
        return None if name == "video_processor" else found.check_argument_for_proper_class(self, name, argument)

    return type(found.__name__, (found,), {"check_argument_for_proper_class": check, "__init__": found.__init__})
