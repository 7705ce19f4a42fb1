"""Stage `evaluate`: samples of the exported pipeline, measured against the training images.

Writes `samples.png` and `report.json`: agreement of prompts and nearest images, memorisation, diversity.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from diffusers import StableDiffusionPipeline

from backbone.config import data_folder, params
from backbone.leaks import pairwise_rmse
from backbone.model import decode, sample_latents
from backbone.train import write_sheet


def nearest_thing_agreement(distance: np.ndarray, things: np.ndarray, prompts: list[str], neighbours: int = 5) -> float:
    """Return the fraction of images with the thing of their prompt among their nearest training images."""
    nearest = np.argsort(distance, axis=1)[:, :neighbours]
    return float(np.mean([prompt in things[row] for prompt, row in zip(prompts, nearest, strict=True)]))


def measure(
    samples: np.ndarray, prompts: list[str], training: np.ndarray, things: np.ndarray, validation: np.ndarray, seed: int = 0
) -> dict[str, Any]:
    """Return the metrics of samples [prompts, seeds, height, width, 3]."""
    count, seeds = samples.shape[:2]
    flat = samples.reshape(count * seeds, *samples.shape[2:])
    distance = pairwise_rmse(flat, training)
    own = [prompt for prompt in prompts for _ in range(seeds)]
    shuffled = list(np.random.default_rng(seed).permutation(own))
    pairs = np.array([pairwise_rmse(group, group)[np.triu_indices(seeds, 1)] for group in samples])
    held_out = pairwise_rmse(validation, training).min(1)
    return {
        "prompts": count,
        "seeds": seeds,
        "nearest5_thing_agreement": nearest_thing_agreement(distance, things, own),
        "nearest5_thing_agreement_shuffled": nearest_thing_agreement(distance, things, shuffled),
        "rmse_to_nearest_training_median": float(np.median(distance.min(1))),
        "rmse_to_nearest_training_median_of_validation_images": float(np.median(held_out)),
        "fraction_within_rmse_25_of_training": float((distance.min(1) <= 25).mean()),
        "fraction_within_rmse_25_of_validation_images": float((held_out <= 25).mean()),
        "training_images_recalled": len(np.unique(distance.argmin(1))),
        "fraction_of_prompts_without_two_samples_within_rmse_20": float((pairs.min(1) > 20).mean()),
    }


@torch.no_grad()
def generate(
    pipeline: StableDiffusionPipeline, prompts: list[str], seeds: int, guidance_scale: float, steps: int
) -> np.ndarray:
    """Return images [prompts, seeds, height, width, 3]. One batch a prompt; equal to calling the pipeline with these seeds."""
    device = pipeline.unet.device
    empty, _ = pipeline.encode_prompt("", device, 1, False)
    images = []
    for prompt in prompts:
        states, _ = pipeline.encode_prompt(prompt, device, 1, False)
        latents = sample_latents(pipeline.unet, states.repeat_interleave(seeds, 0), empty, range(seeds), guidance_scale, steps)
        images.append(decode(pipeline.vae, latents).numpy())
    return np.stack(images)


def main() -> None:
    """Evaluate the export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings, folder = params("evaluate"), data_folder()
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "export", torch_dtype=torch.float32)
    items = pq.read_table(folder / "dataset" / "items.parquet").to_pylist()
    images = np.load(folder / "dataset" / "images.npy", mmap_mode="r")
    training = np.array([item["split"] == "train" and item["sounds"] for item in items])
    held_out = np.array([item["split"] == "validation" and item["sounds"] for item in items])
    things = np.array([item["thing"] for item in items])
    names, counts = np.unique(things[training], return_counts=True)
    prompts = [str(name) for name in names[counts >= settings["min_images"]]]
    samples = generate(pipeline, prompts, settings["seeds"], settings["guidance_scale"], settings["num_inference_steps"])
    report = measure(samples, prompts, np.asarray(images[training]), things[training], np.asarray(images[held_out]))
    report |= {"guidance_scale": settings["guidance_scale"], "num_inference_steps": settings["num_inference_steps"]}
    output = arguments.output or folder / "evaluation"
    write_sheet(samples, prompts, output / "samples.png")
    (output / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
