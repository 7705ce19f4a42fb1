"""Parameters and folders of the backbone pipeline."""

import os
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

HERE = Path(__file__).parent


def params(section: str, path: Path | None = None) -> dict[str, Any]:
    """Return one section of params.yaml."""
    loaded = YAML(typ="safe").load((path or HERE / "params.yaml").read_text(encoding="utf-8"))
    if section not in loaded:
        raise KeyError(f"{path or 'params.yaml'}: section {section!r} is missing; it has {', '.join(loaded)}")
    return dict(loaded[section])


def data_folder() -> Path:
    """Return the folder of all outputs: $BACKBONE_DATA, or backbone/data."""
    return Path(os.environ.get("BACKBONE_DATA", HERE / "data"))


def vae_folder() -> Path:
    """Return the autoencoder with the further trained decoder, or the first one when there is none yet."""
    refined = data_folder() / "decoder" / "vae"
    return refined if refined.exists() else data_folder() / "autoencoder" / "vae"
