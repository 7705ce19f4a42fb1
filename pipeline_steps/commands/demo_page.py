"""Demo page: widgets of Gradio around `DemoBackend`, and the web application that serves them.

Audio is exchanged as files only. Gradio normalises audio given as arrays to its peak, which would falsify the loudness.
"""

from __future__ import annotations

import html
import tempfile
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
import numpy as np
from fastapi import FastAPI
from PIL import Image

from pipeline_steps.commands.audio_scene import MAX_GAIN_DB, MIN_GAIN_DB, Room
from pipeline_steps.commands.demo_backend import (
    MAX_AUDIO_SCALE,
    MAX_GUIDANCE,
    MAX_SEED,
    NUM_SAMPLES,
    DemoBackend,
    wav_bytes,
)
from pipeline_steps.commands.find import BEST
from pipeline_steps.commands.image_sheet import image_grid
from pipeline_steps.commands.scene_generation import MAX_TEXT_LENGTH, GenerationSettings
from pipeline_steps.core.errors import DataError, StageError
from pipeline_steps.core.escape import escape_display, escape_markdown
from pipeline_steps.core.media_shards import SAMPLE_RATE

MAX_FILE_MB = 20
"""Largest upload in units of 2^20 bytes, as Gradio counts."""
MAX_QUEUE = 8
MAX_HISTORY = 24
"""Drawings that a session keeps."""
IMAGE_EXAMPLE_STEP = 6
"""Every sixth held-out image is an example."""
FILE_AGE_SECONDS = 3600
"""Age at which uploaded and drawn files are deleted."""

ALONE: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "minimal"}
"""Events that compute: one at a time, the others wait in the queue."""
INPUT: dict[str, Any] = {"type": "filepath", "editable": False, "buttons": []}
PLAYER: dict[str, Any] = {"type": "filepath", "interactive": False, "buttons": ["download"]}
SHOW_IMAGES = "() => document.querySelector('#drawn').scrollIntoView({behavior: 'smooth', block: 'nearest'})"
"""On a narrow screen the images are below the settings."""
VIEW: dict[str, Any] = {"format": "png", "interactive": False, "buttons": ["download", "fullscreen"]}
"""Without the button that publishes a file on another host."""
NO_SOUND = "Record or drop a sound, or choose an example."
NO_IMAGE = "Drop an image, or choose an example."

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

CONTENT_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
"""The browser loads nothing from other hosts, whatever a component asks for."""

RECORD_AT_TRUE_LEVEL = """<script>
// Gain control and noise suppression of the browser would change the loudness of a recording.
const devices = navigator.mediaDevices;
if (devices) {
  const open = devices.getUserMedia.bind(devices);
  const raw = {autoGainControl: false, noiseSuppression: false, echoCancellation: false};
  devices.getUserMedia = (wanted) =>
    open(wanted.audio ? {...wanted, audio: {...(wanted.audio === true ? {} : wanted.audio), ...raw}} : wanted);
}
</script>"""

CSS = """
.gradio-container {max-width: 1200px !important}
#drawn .grid-wrap, #history .grid-wrap {max-height: none; min-height: 0}
footer {display: none !important}
"""


class LocalRequests:
    """ASGI middleware: refuses requests for or from other host names, and adds headers of the content policy.

    Args:
        app: application to protect.
        hosts: host names without port that are answered.
    """

    def __init__(self, app: Any, hosts: Sequence[str]) -> None:
        self._app = app
        self._hosts = frozenset(hosts)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        named = [_host_name(f"//{headers.get('host', '')}")]
        if origin := headers.get("origin"):
            named.append(_host_name(origin))
        if not self._hosts.issuperset(named):
            await send({"type": "http.response.start", "status": 421, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"This page answers under its own host name only.\n"})
            return

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = {"content-security-policy": CONTENT_POLICY, "x-content-type-options": "nosniff"}
                message["headers"] = [*message["headers"], *((key.encode(), value.encode()) for key, value in added.items())]
            await send(message)

        await self._app(scope, receive, with_policy)


def build_app(backend: DemoBackend, hosts: Sequence[str]) -> Any:
    """ASGI application: the page at `/`, and `/healthz`, which answers 200."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/healthz")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    limits: dict[str, Any] = {"max_file_size": MAX_FILE_MB * 2**20, "show_error": False}
    look: dict[str, Any] = {"head": RECORD_AT_TRUE_LEVEL, "css": CSS, "footer_links": [], "run_history": False}
    off: dict[str, Any] = {"mcp_server": False, "ssr_mode": False, "pwa": False, "enable_monitoring": False}
    page = build_page(backend)
    gr.mount_gradio_app(app, page, "/", **limits, **look, **off)
    # Set by `launch` only. Without them Gradio accepts paths of any file of this machine as uploads, and ends sessions at once.
    page.has_launched = page.is_running = True
    return LocalRequests(app, hosts)


def warm_up(backend: DemoBackend, model: str | None = None) -> None:
    """Draw from a tone once, so that the first visitor waits for nothing to load. Errors as in `DemoBackend.draw`."""
    tone = (0.1 * np.sin(np.arange(5 * SAMPLE_RATE) * 0.06)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tone.wav")
        path.write_bytes(wav_bytes(tone))
        backend.draw([(path, 0.0)], Room.NONE, GenerationSettings(NUM_SAMPLES), model)


def build_page(backend: DemoBackend) -> gr.Blocks:
    """The page: sounds to images, and an image to sounds."""
    with gr.Blocks(title="Seeing Sound", analytics_enabled=False, delete_cache=(600, FILE_AGE_SECONDS)) as page:
        gr.Markdown("# Seeing Sound\nDraw images from sounds, and find sounds for an image.")
        with gr.Tab("Sound to image"):
            _sound_tab(page, backend)
        with gr.Tab("Image to sounds"):
            _image_tab(backend)
    page.queue(max_size=MAX_QUEUE, api_open=False, default_concurrency_limit=1)
    return page


def _sound_tab(page: gr.Blocks, backend: DemoBackend) -> None:
    models = backend.models()
    selected = next(iter(models))
    sounds = backend.examples("audio")
    with gr.Row():
        with gr.Column():
            first = gr.Audio(label="Sound", elem_id="first", **INPUT)
            first_gain = gr.Slider(MIN_GAIN_DB, MAX_GAIN_DB, 0, step=1, label="Gain of the sound in dB", elem_id="first-gain")
            with gr.Accordion("Mix with a second sound", open=False, elem_id="mix") as mix:
                second = gr.Audio(label="Second sound", elem_id="second", **INPUT)
                second_gain = gr.Slider(
                    MIN_GAIN_DB, MAX_GAIN_DB, 0, step=1, label="Gain of the second sound in dB", elem_id="second-gain"
                )
            room = gr.Radio(
                [room.value for room in Room], value=Room.NONE.value, label="Room, at equal loudness", elem_id="room"
            )
            words = gr.Textbox(
                label="Words beside the sound", placeholder="at night", max_length=MAX_TEXT_LENGTH, max_lines=1, elem_id="words"
            )
            with gr.Accordion("Model and sampling", open=False, elem_id="sampling"):
                model = gr.Dropdown(list(models), value=selected, label="Model", elem_id="model")
                weight = gr.Slider(
                    0, MAX_AUDIO_SCALE, GenerationSettings().audio_scale, step=0.1, label="Weight of the sound beside words"
                )
                guidance = gr.Slider(0, MAX_GUIDANCE, _guidance(backend, models[selected]), step=0.5, label="Guidance scale")
                seed = gr.Number(0, precision=0, minimum=0, maximum=MAX_SEED, label="Seed", elem_id="seed")
            examples = None
            if sounds:
                slot = gr.Radio(["first sound", "second sound"], value="first sound", label="Use an example as", elem_id="slot")
                examples = gr.Dataset(
                    components=[gr.Textbox(visible=False)],
                    samples=[[escape_display(name)] for name in sounds.values()],
                    type="index",
                    samples_per_page=12,
                    label="Examples: held-out sounds",
                    elem_id="sounds",
                )
        with gr.Column():
            with gr.Row():
                draw_button = gr.Button("Draw", variant="primary", elem_id="draw")
                again = gr.Button("Draw with another seed", elem_id="again")
            drawn = gr.Gallery(label="Images", columns=2, object_fit="contain", elem_id="drawn", **VIEW)
            status = gr.Markdown(NO_SOUND, elem_id="status")
            mixture = gr.Audio(label="What the model gets", elem_id="mixture", **PLAYER)
            history = gr.Gallery(label="History of this session", columns=4, fit_columns=False, elem_id="history", **VIEW)
    drawings = gr.State([], time_to_live=FILE_AGE_SECONDS)

    def draw(*values: Any) -> list[Any]:
        first, second, first_gain, second_gain, room, words, weight, guidance, seed, model, kept = values
        if first is None:
            return [gr.skip(), gr.skip(), NO_SOUND, gr.skip(), gr.skip()]
        given = [(Path(first), float(first_gain)), *([(Path(second), float(second_gain))] if second else [])]
        text = (words or "").strip() or None
        settings = GenerationSettings(NUM_SAMPLES, int(seed or 0), float(guidance), None, text, float(weight))
        try:
            drawing = backend.draw(given, Room(room), settings, _model(models, model))
        except StageError as error:
            raise _shown(error) from error
        kept = [(Image.fromarray(image_grid(drawing.images)), escape_display(drawing.label)), *kept][:MAX_HISTORY]
        lines = [f"{NUM_SAMPLES} images in {drawing.seconds:.1f} s: {_line(drawing.label)}"]
        lines += [f"Note: {_line(note)}." for note in drawing.notes]
        return [list(drawing.images), _cached(drawing.mixture, "mixture.wav"), "\n\n".join(lines), kept, kept]

    inputs = [first, second, first_gain, second_gain, room, words, weight, guidance, seed, model, drawings]
    outputs = [drawn, mixture, status, history, drawings]
    changes = [first.input, second.input, room.input, words.submit, seed.submit, draw_button.click]
    changes += [slider.release for slider in (first_gain, second_gain, weight, guidance)]
    gr.on(changes, draw, inputs, outputs, trigger_mode="always_last", **ALONE).success(None, js=SHOW_IMAGES)
    again.click(lambda seed: (int(seed or 0) + 1) % MAX_SEED, seed, seed, queue=False).then(draw, inputs, outputs, **ALONE)

    def choose_model(name: str) -> list[Any]:
        try:
            pipeline = backend.pipeline(_model(models, name))
        except StageError as error:
            raise _shown(error) from error
        no_words = {} if pipeline.has_text_encoder else {"value": ""}
        return [pipeline.generation_config.guidance_scale, gr.update(interactive=pipeline.has_text_encoder, **no_words)]

    def list_models() -> Any:
        models.update(backend.models())
        return gr.update(choices=list(models))

    model.input(choose_model, model, [guidance, words], **ALONE).success(draw, inputs, outputs, **ALONE)
    page.load(list_models, None, model, show_progress="hidden")
    if examples is None:
        return

    def choose_sound(index: int, slot: str) -> list[Any]:
        audio_id, name = list(sounds.items())[index]
        try:
            path = _cached(backend.payload(audio_id), f"{name}.flac")
        except StageError as error:
            raise _shown(error) from error
        return [path, gr.skip(), gr.skip()] if slot == "first sound" else [gr.skip(), path, gr.update(open=True)]

    chosen = examples.click(choose_sound, [examples, slot], [first, second, mix])
    chosen.success(draw, inputs, outputs, **ALONE).success(None, js=SHOW_IMAGES)


def _image_tab(backend: DemoBackend) -> None:
    with gr.Row():
        with gr.Column():
            # Not an image input: those are opened in this process before the function runs.
            picture = gr.File(label="Image", file_types=["image"], elem_id="picture")
            seen = gr.Image(label="What the captioner gets", elem_id="seen", **VIEW)
            pictures = dict(list(backend.examples("image").items())[::IMAGE_EXAMPLE_STEP])
            examples = None
            if pictures:
                examples = gr.Dataset(
                    components=[gr.Image(visible=False)],
                    samples=[[_cached(backend.payload(item), f"{name}.png")] for item, name in pictures.items()],
                    label="Examples: held-out images",
                    elem_id="pictures",
                    type="index",
                )
        with gr.Column():
            events = gr.Markdown(NO_IMAGE, elem_id="events")
            reasons, players = [], []
            for _ in range(BEST):
                reasons.append(gr.Markdown(visible=False, elem_classes="reason"))
                players.append(gr.Audio(visible=False, elem_classes="suggested", **PLAYER))

    def find(path: str | None) -> list[Any]:
        if path is None:
            return [None, NO_IMAGE, *_suggestions([])]
        try:
            pixels, found = backend.find(Path(path))
            clips = [(_cached(backend.audio_file(clip["audio_id"]), "suggested.wav"), clip) for clip in found.clips]
        except StageError as error:
            raise _shown(error) from error
        title = "Sound events:" if found.reason is None else f"The captioner abstains: {_line(found.reason)}. Guesses:"
        lines = [
            f"- {_line(event['phrase'])} ({'seen' if event['visible'] else 'inferred'}, "
            f"weight {event['salience'] * event['confidence']:.2f})"
            for event in found.events
        ]
        return [pixels, "\n".join([title, "", *lines]), *_suggestions(clips)]

    outputs = [seen, events, *reasons, *players]
    gr.on([picture.upload, picture.clear], find, picture, outputs, trigger_mode="always_last", **ALONE)
    if examples is not None:
        items = list(pictures.items())

        def choose_picture(index: int) -> str:
            item, name = items[index]
            return _cached(backend.payload(item), f"{name}.png")

        examples.click(choose_picture, examples, picture).success(find, picture, outputs, **ALONE)


def _guidance(backend: DemoBackend, model: str | None) -> float:
    """Default guidance scale of a model; 3 while there is none."""
    try:
        return backend.pipeline(model).generation_config.guidance_scale
    except StageError:
        return 3.0


def _model(models: Mapping[str, str | None], name: str) -> str | None:
    """Model behind a shown name. Other names, e.g. of folders, are refused."""
    if name not in models:
        raise DataError(f"there is no model {name!r}", "reload the page")
    return models[name]


def _suggestions(clips: Sequence[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Updates of all reasons, then of all players."""
    reasons: list[Any] = [gr.update(visible=False)] * BEST
    players: list[Any] = [gr.update(visible=False, value=None)] * BEST
    for place, (path, clip) in enumerate(clips):
        name = Path(clip["path"]).name
        facts = f"score {clip['score']:.3f}, {clip['duration_s']:.1f} s, {_line(clip['license'] or 'license unknown')}"
        text = f"**{place + 1}. {_line(name)}** for: {_line(clip['because'])} ({facts})"
        reasons[place] = gr.update(visible=True, value=text)
        players[place] = gr.update(visible=True, value=path, label=escape_display(name))
    return [*reasons, *players]


def _line(text: object) -> str:
    """Untrusted text in Markdown."""
    return escape_markdown(escape_display(text))


def _shown(error: StageError) -> gr.Error:
    """Message box for an error. Gradio renders its text as HTML."""
    return gr.Error(html.escape(escape_display(str(error), 400)), title="This does not work", print_exception=False)


def _cached(payload: bytes, name: str) -> str:
    """File in Gradio's folder, which deletes it later."""
    return str(gr.processing_utils.save_bytes_to_cache(payload, name, gr.utils.get_upload_folder()))


def _host_name(url: str) -> str:
    """Host of a URL without port; empty if there is none. An IPv6 address keeps its brackets."""
    try:
        name = urlsplit(url).hostname or ""
    except ValueError:
        return ""
    return f"[{name}]" if ":" in name else name
