"""Agreement of neighbors by int8 and float32 vectors of a small trained CLAP tower: `python -m benchmarks.int8_agreement`.

With random weights all sounds lie within a degree of each other, so neighbors are meaningless. Therefore a small tower of the
same architecture is trained for a few minutes to classify the labels of the demo set, which only this script reads. The guard
of `embed.clap.backend: openvino-int8` then measures it on the sounds of the demo set; 99 of the 256 were not used in training.
`benchmarks/clap_throughput.py --checkpoint FOLDER --agree 256 --gold data/demo` measures published weights.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from transformers import ClapModel

from pipeline_steps.audio.log_mel import ClapFeatureConfig, clap_log_mel, split_windows
from pipeline_steps.embed.int8_check import neighbor_agreement
from tests.factories.checkpoints.clap import clap_checkpoint, clap_config, clap_encoder, roberta_tokenizer

ROOT = Path(__file__).resolve().parents[1]

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=180, help="of training, 20 sounds each")
parser.add_argument("--sounds", type=int, default=256, help="on which backends are compared")
arguments = parser.parse_args()
torch.manual_seed(0)
MEL = ClapFeatureConfig(low=50.0)  # as `clap_checkpoint` writes it down


def read(file: Path) -> np.ndarray:
    samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    return np.asarray(soxr.resample(samples.mean(1), rate, MEL.sample_rate), np.float32)


def trained(sounds: list[np.ndarray], labels: list[str]) -> ClapModel:
    """Tower whose vectors are trained to point in the direction of their label."""
    windows = torch.from_numpy(np.concatenate([split_windows(sound, MEL.samples)[:1] for sound in sounds]))
    features = torch.cat([clap_log_mel(window[None], MEL) for window in windows])[:, None]
    names = sorted(set(labels))
    aims = torch.tensor([names.index(label) for label in labels])
    directions = torch.nn.functional.normalize(torch.randn(len(names), 24), dim=1)
    model = ClapModel(clap_config(len(roberta_tokenizer())))
    norm = model.audio_model.audio_encoder.batch_norm
    norm.running_mean.copy_(features.mean((0, 1, 2)))
    norm.running_var.copy_(features.var((0, 1, 2)))
    model.train()
    norm.eval()
    optimiser = torch.optim.AdamW([weight for name, weight in model.named_parameters() if "audio" in name], lr=1.5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, arguments.steps)
    for step in range(arguments.steps):
        chosen = torch.randperm(3 * len(features) // 4)[:20]
        loud = features[chosen] + 6 * torch.randn(20, 1, 1, 1)
        shifted = torch.roll(loud, int(torch.randint(0, 1001, (1,))), 2)
        found = model.get_audio_features(shifted, torch.zeros(20, 1, dtype=torch.bool)).pooler_output
        loss = torch.nn.functional.cross_entropy(found @ directions.T / 0.1, aims[chosen])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 20 == 19:
            print(f"step {step + 1}: loss {loss.item():.2f}", flush=True)
    return model.eval()


def main() -> None:
    files = sorted((ROOT / "data/demo/sounds").glob("*.ogg"))
    order = torch.randperm(len(files)).tolist()
    sounds = [read(files[place]) for place in order]
    with tempfile.TemporaryDirectory() as scratch:
        folder = clap_checkpoint(Path(scratch) / "clap")
        trained(sounds, [files[place].stem.split("-")[1] for place in order]).save_pretrained(folder)
        tested = sounds[-arguments.sounds :]  # includes sounds that were not used in training
        backends = ("torch", "openvino", "openvino-int8")
        vectors = {name: clap_encoder(folder, backend=name).load().encode_audio(tested) for name in backends}
    base = vectors.pop("torch")
    others = (base @ base.T)[~np.eye(len(base), dtype=bool)]
    print(f"different sounds have cosines of {others.mean():.3f} +- {others.std():.3f}")
    for name, found in vectors.items():
        print(name, ", ".join(f"{key} {value:.4f}" for key, value in neighbor_agreement(base, found).items()))


if __name__ == "__main__":
    main()
