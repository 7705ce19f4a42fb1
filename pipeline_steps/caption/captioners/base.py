"""Interface of captioners, and the registry in which stage `caption` finds them.

A captioner is one module with a class and the configuration of its group `caption.<name>`:

    @CAPTIONERS.register("toy")
    class ToyCaptioner(Captioner[float]): ...

Modules of this package are imported to validate configurations: torch and transformers are imported inside functions only.
"""

from __future__ import annotations

import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Self, TypeVar

import pyarrow as pa

from pipeline_steps.caption.captioners.prompt import PromptConfig
from pipeline_steps.core.array_types import ByteArray
from pipeline_steps.core.config import StageConfig
from pipeline_steps.core.errors import StageError
from pipeline_steps.core.gpu_memory import gpu_memory_guard
from pipeline_steps.core.registry import Registry

log = logging.getLogger(__name__)

Name = TypeVar("Name")
Item = TypeVar("Item")
Prediction = TypeVar("Prediction")
"""Output of a captioner's model for one image, before thresholds are applied."""


@dataclass(frozen=True, slots=True)
class SoundEvent:
    """Sound event of an image.

    Attributes:
        phrase: short acoustic phrase, e.g. "a dog barking".
        sound_source: object that makes the sound, e.g. "dog".
        visible: whether the image shows the source; otherwise it is inferred from the scene.
        salience: 0..1, prominence within the scene.
        confidence: 0..1, probability that the source is present and audible.
        distance: one of `core.schemas.DISTANCES`; None if unknown.
    """

    phrase: str
    sound_source: str
    visible: bool
    salience: float
    confidence: float
    distance: str | None = None

    @property
    def weight(self) -> float:
        """Product of salience and confidence."""
        return self.salience * self.confidence


class CaptionFailure(NamedTuple):
    """Quarantine code of an image without a prediction, and a reason of one line.

    CAPTION_FAILED: the model raised an error. CAPTION_UNREADABLE: two responses did not match the schema, or one has no text.
    CAPTION_REFUSED: the server rejected the request, or the model refused. CAPTION_UNREACHED: all attempts for this image
    failed, while the server answered others.
    """

    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class CaptionResult:
    """Caption of an image: its events, or a reason to abstain.

    Attributes:
        events: highest weight first; empty if the captioner abstains.
        code: "" or NO_SOUND (the content is silent), LOW_CONFIDENCE (no event is likely enough), NOT_VERIFIED or NO_TEXT.
        reason: one line that names the best labels.
        score: confidence of the best event, including events below the threshold.
        guesses: events below the threshold, for `sonify find`; they are never paired.
        space: acoustic space of the image, one of `core.schemas.SPACES`; None if unknown.
    """

    events: tuple[SoundEvent, ...]
    code: str
    reason: str
    score: float
    guesses: tuple[SoundEvent, ...] = ()
    space: str | None = None


@dataclass(frozen=True, slots=True)
class EventSelection:
    """Thresholds that select the events of a caption.

    Attributes:
        max_events: maximum number of events per image.
        min_confidence: a captioner abstains if no event reaches this confidence.
        min_relative_weight: events below this fraction of the highest weight are dropped.
    """

    max_events: int = 5
    min_confidence: float = 0.15
    min_relative_weight: float = 0.1


@dataclass(frozen=True, slots=True)
class CaptionOptions:
    """Options that stage `caption` passes to every captioner.

    Attributes:
        selection: thresholds of events.
        prompt: group `caption.prompt`, for captioners that prompt a language model.
        batch_size: images per call of `predict`.
        assets: folder written by stage `assets`.
        root: project folder; relative model paths start here.
        use_text: whether captioners with optional text get the words that came with an image.
    """

    selection: EventSelection = EventSelection()
    prompt: PromptConfig = field(default_factory=PromptConfig)
    batch_size: int = 32
    assets: Path = Path("data/assets")
    root: Path = Path()
    use_text: bool = False


class Captioner(ABC, Generic[Prediction]):
    """Image captioner: predicts, serializes predictions for the cache, and selects the events of a caption.

    The constructor loads no weights. An instance is constructed again in each worker process.

    Args:
        config: group of the captioner, an instance of `config_class`.
        options: options of the stage.
    """

    config_class: ClassVar[type[StageConfig]] = StageConfig
    """Model of group `caption.<name>`."""
    name: ClassVar[str]
    """Part of fingerprints."""
    version: ClassVar[int]
    """Part of fingerprints; raise it when predictions change."""
    schema: pa.Schema
    """Columns of a cached prediction."""
    text_input: ClassVar[Literal["none", "optional", "required"]] = "none"
    """Use of the words that came with an image. `required`: the captioner gets words and an empty image."""

    def __init__(self, config: Any, options: CaptionOptions) -> None:
        self.config = config
        self.options = options

    @classmethod
    def check_config(cls, config: Any, executor: str) -> None:
        """Check the group of the selected captioner when the parameters are read.

        Raises:
            ValueError: a value is missing, or `caption.executor` is not supported.
        """

    @property
    @abstractmethod
    def families(self) -> tuple[str, ...]:
        """Families of the models that process the image; evaluation rejects judges of these families."""

    @property
    def families_complete(self) -> bool:
        """Whether `families` names every model that processes the image."""
        return True

    @abstractmethod
    def describe_prediction(self) -> dict[str, Any]:
        """Everything except the image that determines a prediction: the fingerprint of the cache."""

    @property
    def reads_text(self) -> bool:
        """Whether `stream` gets the words that came with the images; they are part of the cache key of an image."""
        return self.text_input == "required" or (self.text_input == "optional" and self.options.use_text)

    def describe_selection(self) -> dict[str, Any]:
        """Everything that determines the caption of a prediction."""
        selection = self.options.selection
        return {"rules": [selection.max_events, selection.min_confidence, selection.min_relative_weight]}

    def describe(self) -> dict[str, Any]:
        """Prediction, families and selection: the fingerprint of captions."""
        return {**self.describe_prediction(), "family": "+".join(self.families), **self.describe_selection()}

    def load(self) -> Self:
        """Load the weights; repeated calls have no effect."""
        return self

    @abstractmethod
    def predict(self, images: Sequence[ByteArray]) -> Sequence[Prediction | CaptionFailure]:
        """Predict for RGB images [H, W, 3]; one result per image, in the same order."""

    def predict_with_text(self, images: Sequence[ByteArray], texts: Sequence[str]) -> Sequence[Prediction | CaptionFailure]:
        """Predict for images and the untrusted words that came with them; "" for none. Called only if `reads_text`."""
        return self.predict(images)

    def stream(
        self, images: Iterable[tuple[Name, ByteArray]], texts: Mapping[Name, str] | None = None
    ) -> Iterator[tuple[Name, Prediction | CaptionFailure]]:
        """Predict for named images, in any order; by default in batches of `batch_size`.

        Args:
            images: names and images.
            texts: words that came with the images, by name; None unless `reads_text`.

        Raises:
            StageError: an error that stops the whole stage.
        """

        def predict(batch: Sequence[tuple[ByteArray, str]]) -> Sequence[Prediction | CaptionFailure]:
            pixels = [image for image, _ in batch]
            return self.predict(pixels) if texts is None else self.predict_with_text(pixels, [text for _, text in batch])

        source = iter(images)
        while batch := dict(itertools.islice(source, self.options.batch_size)):
            inputs = {name: (image, (texts or {}).get(name, "")) for name, image in batch.items()}
            yield from predict_batch(predict, inputs).items()

    @abstractmethod
    def to_row(self, prediction: Prediction) -> dict[str, Any]:
        """Convert a prediction to a row of `schema`."""

    @abstractmethod
    def from_row(self, row: Mapping[str, Any]) -> Prediction:
        """Convert a row of `schema`, new or cached, to the prediction."""

    @abstractmethod
    def caption(self, prediction: Prediction) -> CaptionResult:
        """Select the events of a prediction."""


CAPTIONERS: Registry[type[Captioner[Any]]] = Registry("captioner", "pipeline_steps.caption.captioners")


def predict_batch(
    predict: Callable[[Sequence[Item]], Sequence[Prediction | CaptionFailure]], images: Mapping[Name, Item]
) -> dict[Name, Prediction | CaptionFailure]:
    """Predict a batch; on an error or a wrong number of results, predict its images one by one.

    A wrong number of results cannot be matched to the images. One by one, an image that fails affects no other image.
    """
    names = list(images)
    try:
        results = predict([images[name] for name in names])
        if len(results) == len(names):
            return dict(zip(names, results, strict=True))
        log.warning("captioner returned %d results for %d images; retrying one by one", len(results), len(names))
    except StageError:
        raise
    except Exception as error:
        log.warning("captioner failed on a batch of %d images (%s); retrying one by one", len(names), error)
    found: dict[Name, Prediction | CaptionFailure] = {}
    for name in names:
        try:
            with gpu_memory_guard("caption.batch_size", "choose a smaller model or a larger GPU"):
                single = predict([images[name]])
        except StageError:
            raise
        except Exception as error:
            found[name] = CaptionFailure("CAPTION_FAILED", f"{type(error).__name__}: {error}")
            continue
        found[name] = (
            single[0] if len(single) == 1 else CaptionFailure("CAPTION_FAILED", f"{len(single)} results for one image")
        )
    return found
