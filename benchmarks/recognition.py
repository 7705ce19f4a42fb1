"""Sheets for a blind test: recognition of the sound source in images generated from a sound.

    python -m benchmarks.recognition sheet [--root .] [--out DIR]       # writes sheet-*.png, options.json, key.json
    python -m benchmarks.recognition grade DIR ANSWERS.json [ANSWERS.json ...]

Each row of a sheet has a number and four images generated from one gold sound, which was not used in training. `options.json`
lists ten labels for each number, one of which is right. A grader sees the sheets and the options and writes
`{"1": "label", ...}`. Only `grade` reads `key.json`. Chance is 10 %.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from pipeline_steps.core.media_shards import MediaShardReader
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import AUDIO, IMAGES
from pipeline_steps.core.tables import read_table
from pipeline_steps.diffusion.pipelines.auto import AutoAudio2ImagePipeline
from pipeline_steps.evaluate.ground_truth import match, parse_manifest

OPTIONS = 10
SAMPLES = 4
PER_SHEET = 24
COLUMNS = 2
SCALE = 2


def gold_sounds(layout: ProjectPaths) -> list[tuple[str, str]]:
    """Audio ids and labels of the gold pairs, in an order that does not depend on the labels."""
    manifest = parse_manifest((layout.root / "data/demo/manifest.csv").read_text(encoding="utf-8-sig"), "manifest")
    images, audio = (
        read_table(layout.catalog / name, schema).to_pylist()
        for name, schema in (("images.parquet", IMAGES), ("audio.parquet", AUDIO))
    )
    return sorted({(pair.audio_id, pair.label) for pair in match(manifest, images, audio).pairs if pair.label})


def choose_options(labels: list[str], seed: int = 0) -> list[list[str]]:
    """Ten labels for each sound, its own among them, in random order."""
    rng = np.random.default_rng(seed)
    distinct = sorted(set(labels))
    options = []
    for label in labels:
        others = [other for other in distinct if other != label]
        chosen = [label, *rng.choice(others, min(OPTIONS - 1, len(others)), replace=False)]
        options.append([str(chosen[i]) for i in rng.permutation(len(chosen))])
    return options


def make_sheet(images: np.ndarray, first: int) -> Image.Image:
    """Sheet of images [N, samples, H, W, 3]; rows are numbered from `first`."""
    count, samples, height, width, _ = images.shape
    cell = (samples * (width * SCALE + 4) + 40, height * SCALE + 6)
    sheet = Image.new("RGB", (COLUMNS * cell[0], -(-count // COLUMNS) * cell[1]), "white")
    pen = ImageDraw.Draw(sheet)
    for n, row in enumerate(images):
        left, top = n % COLUMNS * cell[0], n // COLUMNS * cell[1]
        pen.text((left + 6, top + height * SCALE // 2), str(first + n), fill=0)
        for k, image in enumerate(row):
            large = Image.fromarray(image).resize((width * SCALE, height * SCALE), Image.Resampling.LANCZOS)
            sheet.paste(large, (left + 36 + k * (width * SCALE + 4), top + 3))
    return sheet


def write_sheets(layout: ProjectPaths, out: Path) -> None:
    """Generate images of every gold sound and write sheets, options and key."""
    pipeline = AutoAudio2ImagePipeline.from_pretrained(layout.model)
    media = MediaShardReader(layout.media)
    sounds = gold_sounds(layout)
    embeds = [pipeline.encode_audio(media.sound(audio_id)) for audio_id, _ in sounds]
    images = pipeline.generate_batch(embeds, SAMPLES)
    labels = [label for _, label in sounds]
    out.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(sounds), PER_SHEET):
        make_sheet(images[first : first + PER_SHEET], first + 1).save(out / f"sheet-{first // PER_SHEET + 1}.png")
    options = {str(n): option for n, option in enumerate(choose_options(labels), start=1)}
    (out / "options.json").write_text(json.dumps(options, indent=1), encoding="utf-8")
    (out / "key.json").write_text(json.dumps({str(n): label for n, label in enumerate(labels, start=1)}), encoding="utf-8")
    print(f"{len(sounds)} sounds, {SAMPLES} images each: {out}")


def grade(folder: Path, answers: list[Path]) -> dict[str, float]:
    """Fraction of right answers of each grader, and of the majority (a sound is right if more than half of the graders are)."""
    key = json.loads((folder / "key.json").read_text(encoding="utf-8"))
    given = [json.loads(path.read_text(encoding="utf-8")) for path in answers]
    right = np.array([[answer.get(number) == label for number, label in key.items()] for answer in given])
    result = {path.stem: round(float(row.mean()), 3) for path, row in zip(answers, right, strict=True)}
    return result | {"majority": round(float((right.mean(0) > 0.5).mean()), 3), "sounds": len(key)}


def main() -> None:
    """Write sheets or grade answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sheet = commands.add_parser("sheet")
    sheet.add_argument("--root", type=Path, default=Path())
    sheet.add_argument("--out", type=Path, default=Path("recognition"))
    grading = commands.add_parser("grade")
    grading.add_argument("folder", type=Path)
    grading.add_argument("answers", type=Path, nargs="+")
    arguments = parser.parse_args()
    if arguments.command == "sheet":
        write_sheets(ProjectPaths(arguments.root), arguments.out)
    else:
        print(json.dumps(grade(arguments.folder, arguments.answers), indent=2))


if __name__ == "__main__":
    main()
