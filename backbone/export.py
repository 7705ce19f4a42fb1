"""Stage `export`: write the trained model as a stock `StableDiffusionPipeline` folder with float16 safetensors.

pipeline = StableDiffusionPipeline.from_pretrained("backbone/data/export", torch_dtype=torch.float32)
image = pipeline("a drawing of a dog", num_inference_steps=20, guidance_scale=3.0).images[0]
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import AutoTokenizer, BertModel

from backbone.checkpoint import load_checkpoint
from backbone.config import HERE, data_folder, params, vae_folder
from backbone.model import create_scheduler, create_unet

# Weights of the text encoder. They are an asset of their own and do not count as weights of the backbone.
TEXT_ENCODER_WEIGHTS = "text_encoder/model.safetensors"


def averaged_unet(
    checkpoint: Path, settings: dict[str, Any], latent_channels: int, latent_size: int, average: int
) -> UNet2DConditionModel:
    """Return the UNet with one of the averaged weights of a checkpoint; -1 is the longest average."""
    state = load_checkpoint(checkpoint)
    if state is None:
        raise FileNotFoundError(f"{checkpoint}: no checkpoint; run the stage train first")
    unet = create_unet(settings, latent_channels, latent_size, seed=0)
    with torch.no_grad():
        for parameter, mean in zip(unet.parameters(), state["averages"][average], strict=True):
            parameter.copy_(mean)
    return unet.eval()


def assemble(unet: UNet2DConditionModel, vae: AutoencoderKL, text: Path) -> StableDiffusionPipeline:
    """Return the pipeline of stock components."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=BertModel.from_pretrained(text / "text_encoder"),
        tokenizer=AutoTokenizer.from_pretrained(text / "tokenizer"),
        unet=unet,
        scheduler=create_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(pipeline: StableDiffusionPipeline, folder: Path, card: Path | None = None) -> dict[str, int | str]:
    """Write the pipeline in float16 and return sizes and hashes of its weights."""
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.to(dtype=torch.float16).save_pretrained(temporary, safe_serialization=True)
    if card is not None:
        shutil.copy(card, temporary / "README.md")
    report: dict[str, int | str] = {}
    for path in sorted(temporary.rglob("*.safetensors")):
        name = path.relative_to(temporary).as_posix()
        report[name] = path.stat().st_size
        report[f"{name} sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    report["bytes_without_text_encoder"] = sum(
        size for name, size in report.items() if isinstance(size, int) and name != TEXT_ENCODER_WEIGHTS
    )
    (temporary / "weights.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return report


def publish(export_folder: Path, weights: Path) -> str:
    """Copy an export without the weights of its text encoder, and return its entry for assets.toml."""
    shutil.rmtree(weights, ignore_errors=True)
    lines, outputs = [], []
    for path in sorted(path for path in export_folder.rglob("*") if path.is_file()):
        name = path.relative_to(export_folder).as_posix()
        if name in (TEXT_ENCODER_WEIGHTS, "README.md", "weights.json"):
            continue
        content = path.read_bytes()
        if path.name == "config.json":  # the path of the machine that trained is of no use elsewhere
            config = json.loads(content)
            config.pop("_name_or_path", None)
            content = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
        (weights / name).parent.mkdir(parents=True, exist_ok=True)
        (weights / name).write_bytes(content)
        role = name.replace("/", "_").replace(".", "_")
        digest = hashlib.sha256(content).hexdigest()
        lines += [f"[asset.members.{role}]", f'path = "{name}"', f'sha256 = "{digest}"', f"bytes = {len(content)}"]
        outputs.append(f'  "backbone/{name}",')
    return "\n".join(["outputs = [", *outputs, "]", *lines])


def main() -> None:
    """Export the newest checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="run", help="run folder below the data folder")
    parser.add_argument("--average", type=int, default=-1, help="which of train.ema_relative_std")
    parser.add_argument(
        "--publish", type=Path, help="folder in the repository that gets the weights; prints the entry for assets.toml"
    )
    arguments = parser.parse_args()
    folder = data_folder()
    vae = AutoencoderKL.from_pretrained(vae_folder())
    size = params("dataset")["resolution"] // 2 ** (len(vae.config.block_out_channels) - 1)
    unet = averaged_unet(
        folder / arguments.run / "checkpoint.pt", params("unet"), vae.config.latent_channels, size, arguments.average
    )
    report = export(assemble(unet, vae, folder / "dataset" / "text"), folder / "export", HERE / "CARD.md")
    print(json.dumps(report, indent=2))
    if arguments.publish is not None:
        print(publish(folder / "export", arguments.publish))


if __name__ == "__main__":
    main()
