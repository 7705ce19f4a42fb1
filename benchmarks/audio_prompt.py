"""Names of labeled pool clips by the audio prompt, for several weightings of YAMNet's patches. No image is generated.

Usage: python -m benchmarks.audio_prompt [--root .]

- `named`: the first source has a word of the label;
- `cosine`: mean cosine of the label and the first source (MiniLM), with its standard error;
- `difference`: of the cosine, to equal weights, paired by clip.

Held-out clips are not used.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import torch

from benchmarks.mixtures import Pool
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.diffusion.audio_prompt import AudioPrompt
from pipeline_steps.diffusion.audio_tokens import REFERENCE_DB, to_16k
from pipeline_steps.evaluate.abilities.stimuli import set_loudness
from pipeline_steps.models.audio.yamnet import HOP_SAMPLES, MIN_SAMPLES, YamNet
from pipeline_steps.models.text_audio.minilm import MiniLM
from pipeline_steps.models.text_audio.yamnet_minilm import window_weights

POWERS = (0.0, 0.5, 1.0, 2.0)
SECONDS = 10
EMPTY_WORDS = {"a", "an", "the", "of", "with", "and", "in", "on", "playing"}


def content_words(text: str) -> set[str]:
    """Words of a name, without a plural s."""
    return {word.removesuffix("s") for word in re.findall("[a-z]+", text.lower())} - EMPTY_WORDS


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path())
    layout = ProjectPaths(parser.parse_args().root)
    pool, yamnet, text_encoder, prompt = Pool(layout), YamNet(layout.assets), MiniLM(layout.assets), AudioPrompt()
    yamnet.load()
    text_encoder.load()
    labels = [pool.labels[audio_id].replace("_", " ") for audio_id in pool.audio]
    names: dict[float, list[str]] = {power: [] for power in POWERS}
    for audio_id in pool.audio:
        samples = to_16k(set_loudness(pool.media.sound(audio_id)[: SECONDS * 48_000], REFERENCE_DB))
        patches = yamnet.frames(samples)
        padded = np.pad(samples, (0, MIN_SAMPLES + (len(patches) - 1) * HOP_SAMPLES - len(samples)))
        cut = np.lib.stride_tricks.sliding_window_view(padded, MIN_SAMPLES)[::HOP_SAMPLES]
        with torch.inference_mode():
            probabilities = yamnet(patches)[0].sigmoid()
        for power, found in names.items():
            weights = torch.from_numpy(window_weights(cut, power))
            sources = prompt.sources((probabilities * weights[:, None]).sum(0))
            found.append(sources[0][0] if sources else "")
    truth, cosines = text_encoder.encode(labels), {}
    for power, found in names.items():
        named = np.mean([bool(content_words(label) & content_words(name)) for label, name in zip(labels, found, strict=True)])
        cosines[power] = (truth * text_encoder.encode(found)).sum(1)
        gain = cosines[power] - cosines[POWERS[0]]
        mean, error = ((values.mean(), values.std() / len(values) ** 0.5) for values in (cosines[power], gain))
        print(
            f"RMS ** {power}: {len(labels)} clips, named {named:.3f}, cosine {mean[0]:.4f}, "
            f"difference {error[0]:+.4f} (standard error {error[1]:.4f})"
        )


if __name__ == "__main__":
    main()
