"""Conversion of laion-clap checkpoints to the ClapModel layout: safetensors, configuration, front-end, vocabulary.

    python -m pipeline_steps.models.text_audio.convert_laion_clap CHECKPOINT.pt ROBERTA_FOLDER NEW_FOLDER [--sha256 HEX]

The file is unpickled with `weights_only=True` and numpy's scalars as the only additional types. Shapes and feature fusion are
inferred from the weights. Source of both layouts: laion-clap 1.1.7 (clap_module/htsat.py,
model.py) and transformers (models/clap/modeling_clap.py).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline_steps.audio.log_mel import ClapFeatureConfig, clap_mel_filters
from pipeline_steps.core.errors import ConfigError, DataError, IntegrityError
from pipeline_steps.core.hashing import sha256_file

Weights = dict[str, torch.Tensor]

LOWEST_HZ = 50.0
"""Lowest frequency of laion-clap's mel bands; the default of transformers' extractor is 0."""
TEXT_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
TEXT_EPSILON = 1e-5
"""Epsilon of RoBERTa's layer norms; the default of ClapTextConfig is 1e-12."""

DROPPED = re.compile(
    r"audio_branch\.(spectrogram_extractor|logmel_extractor|tscam_conv|head)\.|(audio|text)_transform\.|.*\.attn_mask$"
    r"|.*relative_position_index$|.*embeddings\.(position_ids|token_type_ids)$"
)
"""Front-end constants, the tag classifier, the training heads, and buffers that both sides compute."""

RENAMED = (
    (re.compile(r"^text_branch\."), "text_model."),
    (re.compile(r"^audio_branch\."), "audio_model.audio_encoder."),
    (re.compile(r"(_projection)\.0\."), r"\1.linear1."),
    (re.compile(r"(_projection)\.2\."), r"\1.linear2."),
    (re.compile(r"(audio_encoder)\.bn0\."), r"\1.batch_norm."),
    (re.compile(r"(blocks\.\d+)\.norm1\."), r"\1.layernorm_before."),
    (re.compile(r"(blocks\.\d+)\.norm2\."), r"\1.layernorm_after."),
    (re.compile(r"(blocks\.\d+)\.attn\.proj\."), r"\1.attention.output.dense."),
    (re.compile(r"(blocks\.\d+)\.attn\."), r"\1.attention.self."),
    (re.compile(r"(blocks\.\d+)\.mlp\.fc1\."), r"\1.intermediate.dense."),
    (re.compile(r"(blocks\.\d+)\.mlp\.fc2\."), r"\1.output.dense."),
)


@dataclass(frozen=True, slots=True)
class ClapArchitecture:
    """Architecture inferred from the weights.

    Attributes:
        width: of the patch embedding (96: HTSAT-tiny, 128: HTSAT-base).
        depths, heads: blocks and attention heads of each stage.
        window: side of an attention window, in patches.
        fused: whether the network has feature fusion.
        dimension: of the joint space.
    """

    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int
    fused: bool
    dimension: int

    @property
    def front_end(self) -> ClapFeatureConfig:
        """Log-mel front-end of the checkpoint's training."""
        return ClapFeatureConfig(low=LOWEST_HZ, scale="htk" if self.fused else "slaney")


def read_laion(path: Path, sha256: str = "") -> Weights:
    """Weights of an original checkpoint, without the prefix `module.` of data-parallel training.

    Raises:
        DataError: the file does not exist.
        IntegrityError: the sha256 differs, the pickle has other objects than tensors and numbers, or the file is no laion-clap
            checkpoint.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing", "download laion-clap's checkpoint, or correct the path")
    if sha256 and (found := sha256_file(path)) != sha256:
        raise IntegrityError(f"{path}: sha256 expected {sha256}, got {found}", "download the file again, or correct the sha256")
    scalar = np.float64(0).__reduce__()[0]  # its module differs between versions of numpy
    scalars: list[Any] = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    kinds = [type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")]
    try:
        with torch.serialization.safe_globals([*scalars, np.dtype, *kinds]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a manipulated file may raise any error
        raise IntegrityError(
            f"{path} cannot be read: {' '.join(str(error).split())[:160]}", "use a file of tensors and plain numbers"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    weights = {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not any(name.startswith("audio_branch.patch_embed.") for name in weights):
        raise IntegrityError(f"{path} has no HTSAT audio branch", "use a laion-clap checkpoint with an HTSAT encoder")
    if "text_branch.embeddings.word_embeddings.weight" not in weights:
        raise IntegrityError(f"{path} has no RoBERTa text branch", "use a laion-clap checkpoint with tmodel roberta")
    return weights


def infer_architecture(weights: Weights) -> ClapArchitecture:
    """Architecture of the network that has these weights."""
    blocks = [
        re.match(r"audio_branch\.layers\.(\d+)\.blocks\.(\d+)\.attn\.relative_position_bias_table", name) for name in weights
    ]
    found = sorted({(int(match[1]), int(match[2])) for match in blocks if match})
    stages = 1 + max(stage for stage, _ in found)
    tables = [weights[f"audio_branch.layers.{stage}.blocks.0.attn.relative_position_bias_table"] for stage in range(stages)]
    return ClapArchitecture(
        width=len(weights["audio_branch.patch_embed.proj.weight"]),
        depths=tuple(sum(at == stage for at, _ in found) for stage in range(stages)),
        heads=tuple(table.shape[1] for table in tables),
        window=(round(len(tables[0]) ** 0.5) + 1) // 2,
        fused="audio_branch.patch_embed.mel_conv2d.weight" in weights,
        dimension=len(weights["audio_projection.2.weight"]),
    )


def rename_keys(weights: Weights) -> Weights:
    """Weights under the names of ClapModel, with query, key and value split."""
    result: Weights = {}
    for name, value in weights.items():
        if DROPPED.match(name):
            continue
        for pattern, new in RENAMED:
            name = pattern.sub(new, name)
        if ".attention.self.qkv." in name:
            parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
            result.update({name.replace(".qkv.", f".{part}."): rows.contiguous() for part, rows in parts})
        else:
            result[name] = value.contiguous()
    return result


def load_text_config(folder: Path) -> dict[str, Any]:
    """Contents of RoBERTa's `config.json`.

    Raises:
        ConfigError: the folder has no configuration or no vocabulary.
    """
    if not (folder / "config.json").is_file() or not any(
        (folder / name).is_file() for name in ("tokenizer.json", "vocab.json")
    ):
        raise ConfigError(
            f"{folder}: config.json and tokenizer.json (or vocab.json and merges.txt) are needed",
            "download those of roberta-base",
        )
    settings: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return settings


def clap_configuration(weights: Weights, text: Mapping[str, Any]) -> Any:
    """ClapConfig of the weights; heads and epsilon of the text branch come from RoBERTa's configuration."""
    from transformers import ClapConfig

    shape = infer_architecture(weights)
    words, hidden = weights["text_branch.embeddings.word_embeddings.weight"].shape
    layers = {name.split(".")[3] for name in weights if name.startswith("text_branch.encoder.layer.")}
    audio = {
        "patch_embeds_hidden_size": shape.width,
        "hidden_size": shape.width * 2 ** (len(shape.depths) - 1),
        "depths": list(shape.depths),
        "num_attention_heads": list(shape.heads),
        "window_size": shape.window,
        "enable_fusion": shape.fused,
        "fusion_type": "aff_2d" if shape.fused else None,
    }
    text_config = {
        "vocab_size": words,
        "hidden_size": hidden,
        "num_hidden_layers": len(layers),
        "num_attention_heads": int(text.get("num_attention_heads", hidden // 64)),
        "intermediate_size": len(weights["text_branch.encoder.layer.0.intermediate.dense.weight"]),
        "max_position_embeddings": len(weights["text_branch.embeddings.position_embeddings.weight"]),
        "layer_norm_eps": float(text.get("layer_norm_eps", TEXT_EPSILON)),
    }
    return ClapConfig(audio_config=audio, text_config=text_config, projection_dim=shape.dimension)


def check_front_end(weights: Weights, shape: ClapArchitecture) -> None:
    """Check that the checkpoint's mel filters are those of its converted front-end.

    Raises:
        IntegrityError: the filters differ.
    """
    own = weights.get("audio_branch.logmel_extractor.melW")
    if own is None or shape.fused:  # a fused network gets its features as input and does not use its stored filters
        return
    made = clap_mel_filters(shape.front_end)
    if own.shape != made.shape or np.abs(own.float().numpy() - made).max() > 1e-6:
        raise IntegrityError("the checkpoint's own mel filters are not laion-clap's (64 bands, 50 to 14000 Hz, 1024 at 48 kHz)")


def convert(checkpoint: Path, text: Path, folder: Path, sha256: str = "") -> Path:
    """Write a ClapModel folder of an original checkpoint, which transformers and this project can load.

    Args:
        checkpoint: laion-clap's .pt file.
        text: folder with RoBERTa's `config.json` and vocabulary.
        folder: created; must be empty if it exists.
        sha256: of the checkpoint, checked when given.

    Raises:
        ConfigError, DataError, IntegrityError: the input is missing or invalid, or has weights that cannot be converted.
    """
    from safetensors.torch import save_file
    from transformers import ClapFeatureExtractor, ClapModel

    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty", "name a new folder")
    weights = read_laion(checkpoint, sha256)
    shape = infer_architecture(weights)
    check_front_end(weights, shape)
    config = clap_configuration(weights, load_text_config(text))
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in ClapModel(config).state_dict().items()}
    made = rename_keys(weights)
    made |= {name: torch.zeros(wanted[name], dtype=torch.int64) for name in wanted if name.endswith("num_batches_tracked")}
    computed = {name for name in wanted if name.endswith(("relative_position_index", "position_ids", "token_type_ids"))}
    odd = sorted((set(wanted) - computed - set(made)) | (set(made) - set(wanted)))
    odd += sorted(name for name in set(wanted) & set(made) if wanted[name] != tuple(made[name].shape))
    if odd:
        raise IntegrityError(
            f"{checkpoint}: {len(odd)} weights do not fit ClapModel (first: {odd[0]})", "use an HTSAT checkpoint"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in TEXT_FILES[1:]:
        if (text / name).is_file():
            shutil.copyfile(text / name, folder / name)
    front_end = shape.front_end
    truncation = "fusion" if shape.fused else "rand_trunc"
    extractor = ClapFeatureExtractor(truncation=truncation, padding="repeatpad", frequency_min=front_end.low)
    extractor.save_pretrained(folder)
    config.architectures = ["ClapModel"]
    config.save_pretrained(folder)
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def main() -> None:
    """Command-line interface."""
    parser = argparse.ArgumentParser(description="Convert a laion-clap checkpoint to the ClapModel layout (safetensors).")
    parser.add_argument("checkpoint", type=Path, help="laion-clap's .pt file")
    parser.add_argument("text", type=Path, help="folder with RoBERTa's config.json and vocabulary")
    parser.add_argument("folder", type=Path, help="new folder")
    parser.add_argument("--sha256", default="", help="of the checkpoint, checked when given")
    given = parser.parse_args()
    print(convert(given.checkpoint, given.text, given.folder, given.sha256))


if __name__ == "__main__":
    main()
