"""Command line: convert a published Inception checkpoint (.pth) to a folder for the judges `inception` and `inception_v3`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from pipeline_steps.core.atomic import write_json
from pipeline_steps.core.errors import ConfigError, DataError, IntegrityError
from pipeline_steps.core.hashing import sha256_file
from pipeline_steps.evaluate.judges.inception import ARCHITECTURE, check_weights


def convert(checkpoint: Path, folder: Path, sha256: str = "") -> Path:
    """Convert a .pth file: inception-2015-12-05 of pytorch-fid or torch-fidelity, or torchvision's.

    The file is loaded with `weights_only=True`, which rejects pickles that would run code.

    Args:
        checkpoint: the .pth file.
        folder: new or empty folder.
        sha256: expected hash of the file; empty: not checked.

    Raises:
        ConfigError: the folder is not empty.
        DataError: the file is missing.
        IntegrityError: the file has another hash, or does not hold the weights of an Inception-v3.
    """
    from pickle import UnpicklingError

    from safetensors.torch import save_file

    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty", "choose a new folder")
    if not checkpoint.is_file():
        raise DataError(f"{checkpoint} is missing", "check the path of the .pth file")
    found = sha256_file(checkpoint)
    if sha256 and found != sha256:
        raise IntegrityError(f"{checkpoint}: sha256 is {found}, expected {sha256}", "download it again")
    try:
        weights = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise IntegrityError(f"{checkpoint}: does not contain tensors alone: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(weights, dict) or "fc.weight" not in weights:
        raise IntegrityError(f"{checkpoint}: fc.weight is missing; the weights need the names of torchvision")
    classes = int(weights["fc.weight"].shape[0])
    check_weights(weights, classes, str(checkpoint))
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    write_json(folder / "config.json", {"architecture": ARCHITECTURE, "num_classes": classes})
    return folder


def main() -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(description="Convert an Inception-v3 .pth file to a folder of safetensors.")
    parser.add_argument("checkpoint", type=Path, help="e.g. pt_inception-2015-12-05-6726825d.pth")
    parser.add_argument("folder", type=Path, help="new folder")
    parser.add_argument("--sha256", default="", help="of the file, checked when given")
    given = parser.parse_args()
    print(convert(given.checkpoint, given.folder, given.sha256))


if __name__ == "__main__":
    main()
