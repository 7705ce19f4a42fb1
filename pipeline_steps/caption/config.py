"""Parameters of the `caption` stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline_steps.core.config import StageConfig
from pipeline_steps.core.executors.base import ExecutorName, RayConfig


class VlmConfig(StageConfig):
    """Captioner `vlm`: a transformers image-text-to-text model."""

    model: str = Field(default="", max_length=500, description="hub id or local folder")
    revision: str = Field(
        default="", max_length=64, description="commit (40 hex digits) of a hub id; sha256 of a folder (64), checked when given"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(default="auto", description="auto: bfloat16 on GPU")
    constrain: bool = Field(default=True, description="decode by the JSON schema (needs the extra `vlm`)")


class OpenAIServerConfig(StageConfig):
    """Captioner `endpoint`: an OpenAI-compatible server. The key comes from the environment alone."""

    url: str = Field(default="http://127.0.0.1:8000/v1", pattern=r"^https?://[^\s@]+$", description="up to and with /v1")
    model: str = Field(default="", max_length=500, description="name under which the server serves it")
    families: list[str] = Field(default_factory=list, description="of its vision tower, e.g. [clip]: no judge may be of one")
    key_variable: str = Field(
        default="", pattern=r"^[A-Za-z0-9_]*$", description="environment variable with the key; empty: no key"
    )
    guided: Literal["json_schema", "json_object", "none"] = Field(
        default="json_schema", description="what the server is asked to keep"
    )
    concurrency: int = Field(default=8, ge=1, le=1024, description="requests in flight")
    requests_per_second: float = Field(default=0.0, ge=0, le=10_000, description="0: no limit")
    timeout_seconds: float = Field(default=120.0, gt=0, le=3600, description="of one request")
    attempts: int = Field(default=6, ge=1, le=20, description="of one request, with growing waits")


class VlmPromptConfig(StageConfig):
    """What `vlm` and `endpoint` share: how they are asked."""

    max_new: int = Field(default=400, ge=16, le=8192, description="tokens of an answer")
    verify: bool = Field(default=False, description="a second question for each event: could one hear it here?")
    min_verified: float = Field(default=0.5, ge=0, le=1, description="probability of yes below which an event is dropped")


class CaptionConfig(StageConfig):
    """Which captioner looks at the pictures, and what counts as an event."""

    captioner: Literal["tagger", "vlm", "endpoint"] = Field(
        "tagger", description="`tagger`: ImageNet tags through the sound lexicon; `vlm`, `endpoint`: a vision-language model"
    )
    vlm: VlmConfig = VlmConfig()
    endpoint: OpenAIServerConfig = OpenAIServerConfig()
    asking: VlmPromptConfig = VlmPromptConfig()
    detectors: list[Literal["ssd"]] = Field(
        default_factory=list, max_length=1, description="further taggers; `ssd` forbids judges of the family ssd-mobilenet"
    )
    models: list[Literal["efficientnet_lite0", "efficientnet_lite3"]] = Field(
        ["efficientnet_lite0", "efficientnet_lite3"],
        min_length=1,
        max_length=2,
        description="networks whose probabilities are averaged, in any order",
    )
    views: list[Literal["crop", "pad", "stretch"]] = Field(
        ["crop"], min_length=1, max_length=3, description="framings of a picture whose probabilities are averaged"
    )
    min_probability: float = Field(1e-3, gt=0, lt=1, description="tags below it are forgotten")
    prior_strength: float = Field(1.0, ge=0, le=1, description="how far the tagger's favourite labels are discounted; 0: not")
    max_events: int = Field(5, ge=1, le=20, description="events kept per picture")
    min_confidence: float = Field(0.15, ge=0, le=1, description="a picture abstains unless one of its events reaches it")
    min_share: float = Field(
        0.1, ge=0, le=1, description="a further event below this share of the best one's weight is dropped"
    )
    max_phrase: int = Field(120, ge=8, le=2000, description="characters of an event's phrase")
    batch_size: int = Field(32, ge=1, le=4096, description="pictures per forward pass and per memo part")
    max_failed_fraction: float = Field(0.05, ge=0, le=1, description="the stage fails above this share of quarantined pictures")
    cache_dir: str = Field("", max_length=1000, description="folder or fsspec URL of the memo; empty: .cache/items")
    executor: ExecutorName = Field("local", description="`local`: this process; `ray`: actors of a Ray cluster")
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _model(self) -> CaptionConfig:
        if self.captioner == "vlm" and not self.vlm.model:
            raise ValueError("captioner vlm needs vlm.model, a hub id or a folder")
        if self.captioner == "endpoint" and not self.endpoint.model:
            raise ValueError("captioner endpoint needs endpoint.model, the name under which the server serves it")
        if self.captioner == "endpoint" and self.executor == "ray":
            raise ValueError(
                "captioner endpoint needs engine local: one process keeps a server busy, each actor has limits of its own"
            )
        return self
