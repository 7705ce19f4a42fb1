"""`sonify find`: retrieve audio for an image."""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline_steps.commands.console import JsonFlag, handle_errors, layout_of, print_result, table
from pipeline_steps.commands.draw import load_media
from pipeline_steps.core.errors import DataError
from pipeline_steps.core.project_paths import ProjectPaths

if TYPE_CHECKING:
    from pipeline_steps.caption.captioners.base import CaptionResult

BEST = 5
CANDIDATES = 50


def caption_image(layout: ProjectPaths, params: dict[str, Any], image_path: Path) -> CaptionResult:
    """Caption an image file with the configured captioner.

    Raises:
        DataError: the file is not a usable image.
    """
    import numpy as np
    from PIL import Image

    from pipeline_steps.caption.captioners.base import CaptionFailure
    from pipeline_steps.caption.config import CaptionConfig
    from pipeline_steps.caption.stage import build_captioner
    from pipeline_steps.core.config import parse_section

    kind, payload = load_media(layout, image_path)
    if kind != "image":
        raise DataError(f"{image_path} is an audio file", "give an image; for audio: sonify draw")
    with Image.open(io.BytesIO(payload), formats=("PNG",)) as image:
        pixels = np.asarray(image.convert("RGB"))
    captioner = build_captioner(parse_section(CaptionConfig, "caption", params), layout).load()
    _, prediction = next(captioner.stream([(image_path.name, pixels)]))
    if isinstance(prediction, CaptionFailure):
        raise DataError(
            f"{image_path} could not be captioned: {prediction.code}: {prediction.reason}", "try again, or use another image"
        )
    return captioner.caption(prediction)


def rank_audio(layout: ProjectPaths, params: dict[str, Any], events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rank audio of the pool for the events: candidates from the index, exact scores.

    `score` is the mean over the events of their inner product with the clip, weighted by salience x confidence.

    Raises:
        DataError, IntegrityError: the embeddings or the index are missing, damaged or do not belong together.
    """
    import numpy as np

    from pipeline_steps.core.config import parse_section
    from pipeline_steps.core.schemas import AUDIO
    from pipeline_steps.core.tables import read_table
    from pipeline_steps.embed.config import EmbedConfig
    from pipeline_steps.embed.stage import build_encoder, embed_texts
    from pipeline_steps.retrieve.config import RetrieveConfig
    from pipeline_steps.retrieve.stage import open_pool_index

    config = parse_section(RetrieveConfig, "retrieve", params)
    index, vectors, audio_ids = open_pool_index(layout, config)
    chosen = parse_section(EmbedConfig, "embed", params)
    encoder = build_encoder(chosen, layout).load()
    phrases = [event["phrase"] for event in events]
    queries = embed_texts(encoder, chosen, layout, phrases)[0]
    if queries.shape[1] != vectors.shape[1]:
        raise DataError("embed in params.yaml is not what the embeddings were made with", "dvc repro retrieve")
    weights = np.array([event["salience"] * event["confidence"] for event in events], np.float64)
    weights /= weights.sum()
    rows = np.unique(index.search(queries, CANDIDATES)[0])
    rows = rows[rows >= 0]
    similarity = queries.astype(np.float64) @ vectors[rows].T.astype(np.float64)
    scores = weights @ similarity
    catalog = {row["audio_id"]: row for row in read_table(layout.catalog / "audio.parquet", AUDIO).to_pylist()}
    found = []
    for place in np.argsort(-scores, kind="stable")[:BEST]:
        row = catalog[audio_ids[rows[place]]]
        because = events[int(np.argmax(weights * similarity[:, place]))]["phrase"]
        clip = {name: row[name] for name in ("audio_id", "path", "license")} | {"duration_s": round(row["duration_s"], 2)}
        found.append(clip | {"score": round(float(scores[place]), 4), "because": because})
    return found


@handle_errors
def find(
    context: typer.Context,
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="Image file: JPEG, PNG, WebP, GIF, BMP, TIFF.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="WAV to write; default: name of IMAGE + .sound.wav.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Print the sound events of an image and the five best audio clips of the pool; write the best one as WAV."""
    import soundfile
    import torch

    from pipeline_steps.core.atomic import atomic_path
    from pipeline_steps.core.config import load_params
    from pipeline_steps.core.media_shards import SAMPLE_RATE, MediaShardReader

    layout = layout_of(context)
    params = load_params(layout.params)
    torch.set_num_threads(1)  # one image and a few words: more threads are slower
    caption = caption_image(layout, params, image)
    # Where the stage would abstain, this command prints the best guesses and marks them as guesses.
    events = [asdict(event) for event in caption.events or caption.guesses]
    reason = f"{caption.code}: {caption.reason}" if caption.code else None
    if not events:
        print_result(
            {"events": [], "audio": [], "wav": None, "reason": reason}, [f"no event: {reason}; no WAV written"], as_json
        )
        return
    clips = rank_audio(layout, params, events)
    target = out or Path(f"{image.stem}.sound.wav")
    with atomic_path(target) as temporary:
        soundfile.write(
            temporary, MediaShardReader(layout.media).sound(clips[0]["audio_id"]), SAMPLE_RATE, subtype="PCM_16", format="WAV"
        )
    lines = ["events:"] if reason is None else [f"the pipeline would abstain: {reason}", "guesses:"]
    lines += table(
        [f"  {e['salience'] * e['confidence']:.3f}", e["phrase"], "seen" if e["visible"] else "inferred"] for e in events
    )
    lines += ["audio:"]
    lines += table(
        [f"  {c['score']:.3f}", c["path"], f"{c['duration_s']:.1f} s", c["license"] or "-", f"for: {c['because']}"]
        for c in clips
    )
    lines.append(str(target))
    print_result({"events": events, "audio": clips, "wav": str(target), "reason": reason}, lines, as_json)
