"""Make `pipeline_steps/caption/label_prior.csv`: how often the tagger says each label over the pool pictures.

    python benchmarks/label_prior.py [--root DIR]

Reads catalog, media and weights of the project in DIR; the tagger has its default models. Held-out pictures and labels take no
part.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import torch

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from pipeline_steps.caption.captioners.base import CaptionOptions  # noqa: E402
from pipeline_steps.caption.captioners.tagger import TaggerCaptioner, TaggerConfig  # noqa: E402
from pipeline_steps.caption.lexicon import IMAGENET  # noqa: E402
from pipeline_steps.core.media_shards import MediaShardReader  # noqa: E402
from pipeline_steps.core.project_paths import ProjectPaths  # noqa: E402
from pipeline_steps.core.schemas import IMAGES  # noqa: E402
from pipeline_steps.core.tables import read_table  # noqa: E402

LEAST = 5e-6


def main() -> None:
    """Write the mean probability of each label; those below 5e-6 are left out and count as 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, default=PROJECT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    layout = ProjectPaths(options.root)
    rows = read_table(layout.catalog / "images.parquet", IMAGES).to_pylist()
    pool = [row["image_id"] for row in rows if not row["holdout"]]
    media, tagger = MediaShardReader(layout.media), TaggerCaptioner(TaggerConfig(), CaptionOptions(assets=layout.assets)).load()
    total = np.zeros(1000, np.float64)
    labels: dict[int, str] = {}
    for image_id in pool:
        for tag in tagger.predict([media.image(image_id)])[0]:
            if tag.vocabulary == IMAGENET:
                total[tag.index] += tag.probability
                labels[tag.index] = tag.label
    with (PROJECT / "pipeline_steps/caption/label_prior.csv").open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["index", "label", "prior"])
        for index, value in enumerate(total / len(pool)):
            if value >= LEAST:
                writer.writerow([index, labels[index], f"{value:.6f}"])
    print(f"prior of {len(pool)} pictures written")


if __name__ == "__main__":
    main()
