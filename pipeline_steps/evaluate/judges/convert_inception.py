"""Convert a published Inception checkpoint (`.pth`) into a folder that the judges `inception` and `inception_v3` load."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from pipeline_steps.core.atomic import write_json
from pipeline_steps.core.errors import ConfigError, DataError, IntegrityError
from pipeline_steps.core.hashing import sha256_file
from pipeline_steps.evaluate.judges.inception import ARCHITECTURE, check_weights


def convert(checkpoint: Path, folder: Path, sha256: str = "") -> Path:
    """Write the folder of a published .pth file (pytorch-fid's or torch-fidelity's inception-2015-12-05, or torchvision's).

    The file is opened with `weights_only=True`: tensors alone, a pickle that would run code is refused.

    Raises:
        ConfigError, DataError, IntegrityError: the folder is not empty, the file is missing or not what it should be.
    """
    from pickle import UnpicklingError

    from safetensors.torch import save_file

    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty", "name a new folder")
    if not checkpoint.is_file():
        raise DataError(f"{checkpoint} is missing", "name the .pth file")
    found = sha256_file(checkpoint)
    if sha256 and found != sha256:
        raise IntegrityError(f"{checkpoint}: sha256 is {found}, expected {sha256}", "fetch it again")
    try:
        weights = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise IntegrityError(f"{checkpoint}: not a file of tensors alone: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(weights, dict) or "fc.weight" not in weights:
        raise IntegrityError(f"{checkpoint}: no fc.weight: not an Inception-v3 under torchvision's names")
    classes = int(weights["fc.weight"].shape[0])
    check_weights(weights, classes, str(checkpoint))
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    write_json(folder / "config.json", {"architecture": ARCHITECTURE, "num_classes": classes})
    return folder


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Convert an Inception-v3 .pth file to a folder of safetensors.")
    parser.add_argument("checkpoint", type=Path, help="e.g. pt_inception-2015-12-05-6726825d.pth")
    parser.add_argument("folder", type=Path, help="new folder")
    parser.add_argument("--sha256", default="", help="of the file, checked when given")
    given = parser.parse_args()
    print(convert(given.checkpoint, given.folder, given.sha256))


if __name__ == "__main__":
    main()
