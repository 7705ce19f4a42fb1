"""Registry of text-audio encoders: names, light imports, recorded names."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipeline_steps.core.errors import ConfigError
from pipeline_steps.models.text_audio.base import TEXT_AUDIO_ENCODERS, recorded_encoder

NAMES = ("clap", "laion_clap", "pe_av", "yamnet_minilm")


def test_registered_encoders_are_complete() -> None:
    assert set(TEXT_AUDIO_ENCODERS.names()) >= set(NAMES)
    for name in NAMES:
        encoder = TEXT_AUDIO_ENCODERS.get(name)
        assert not getattr(encoder, "__abstractmethods__", None)
        assert encoder.config_class is not None
        assert encoder.config_class.model_config["extra"] == "forbid"


def test_configuration_is_validated_without_large_packages() -> None:
    program = f"""
import sys
from pipeline_steps.embed.config import EmbedConfig
EmbedConfig.from_params({{"encoder": "clap", **{{name: {{}} for name in {NAMES}}}, "clap": {{"model": "owner/name"}}}})
assert not {{"torch", "transformers", "openvino", "nncf", "laion_clap"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_meta_names_the_encoder_of_the_embeddings() -> None:
    found = [recorded_encoder(meta) for meta in ({}, {"encoder": "clap"}, {"encoder": "laion"})]
    assert found == [TEXT_AUDIO_ENCODERS.get(name) for name in ("yamnet_minilm", "clap", "laion_clap")]
    with pytest.raises(ConfigError, match="unknown text-audio encoder 'bridges'"):
        recorded_encoder({"encoder": "bridges"})
