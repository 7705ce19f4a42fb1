"""Parameters of the flows: flat pydantic models, shown as forms in Prefect's UI."""

from __future__ import annotations

import enum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from flows.dvc_graph import read_graph
from flows.git_worktree import find_project
from flows.param_overrides import RunRequest
from pipeline_steps.core.errors import ConfigError
from pipeline_steps.core.presets import preset_names

AS_COMMITTED = "as committed"


def _choices(name: str, values: tuple[str, ...]) -> Any:
    """Enumeration, shown as a list of choices in the form; free text if the project is not available."""
    return enum.StrEnum(name, {value: value for value in values}) if values else str


def _project_choices() -> tuple[tuple[str, ...], tuple[str, ...]]:
    try:
        root = find_project()
        return tuple(node.name for node in read_graph(root)), (AS_COMMITTED, *preset_names(root))
    except ConfigError:
        return (), ()


_STAGES, _PRESETS = _project_choices()
Stage: Any = _choices("Stage", _STAGES)
Preset: Any = _choices("Preset", _PRESETS)


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _StageChoice(_Form):
    stages: list[Stage] = Field(
        default_factory=list,
        title="Stages",
        description="Stages to run, with the stages that they depend on; empty: all.",
    )


class RunParameters(_Form):
    """Parameters of a run. The defaults bring the committed state up to date."""

    preset: Preset = Field(
        default=Preset(AS_COMMITTED),
        title="Preset",
        description="Overlay of presets/ for params.yaml, or params.yaml as committed.",
    )
    overrides: list[str] = Field(
        default_factory=list,
        title="Parameter overrides",
        description="One section.key=value per line. Applied after the preset, for this run only.",
    )
    seed: int = Field(default=-1, ge=-1, title="Seed", description="Value of every parameter named seed; -1: unchanged.")
    force: bool = Field(default=False, title="Force", description="Run the stages even if nothing has changed.")
    revision: str = Field(
        default="HEAD",
        min_length=1,
        pattern=r"^[A-Za-z0-9_./@^~{}-]+$",
        title="Revision",
        description="Git revision to run: HEAD, a commit, or a run branch (runs/NAME) to continue from its results.",
    )
    wait_minutes: int = Field(
        default=60, ge=0, le=10_080, title="Wait", description="Longest wait for another run in this workspace, in minutes."
    )

    @field_validator("revision")
    @classmethod
    def _no_option(cls, value: str) -> str:
        if value.startswith("-"):
            raise ValueError("a revision must not begin with a dash")
        return value

    def request(self) -> RunRequest:
        """Requested parameters of the stages."""
        preset = "" if str(self.preset) == AS_COMMITTED else str(self.preset)
        overrides = tuple(line.strip() for line in self.overrides if line.strip())
        return RunRequest(preset, overrides, None if self.seed < 0 else self.seed, self.revision)


class ReproduceParameters(RunParameters, _StageChoice):
    """Parameters of flow `reproduce`."""


class PromotionMode(enum.StrEnum):
    """How a promotion is decided."""

    manual = "manual"
    auto = "auto"
    dry_run = "dry-run"


class PromoteParameters(_Form):
    """Parameters of flow `promote`."""

    mode: PromotionMode = Field(
        default=PromotionMode.manual,
        title="Mode",
        description="manual: the run pauses for approval; auto: the gate decides; dry-run: only compare.",
    )
    timeout_hours: float = Field(
        default=72.0, gt=0, le=720, title="Timeout", description="Hours to wait for approval; after that nothing changes."
    )


class NightlyParameters(RunParameters):
    """Parameters of flow `nightly`."""

    promotion: PromotionMode = Field(
        default=PromotionMode.manual,
        title="Promotion",
        description="manual: start a promotion run that pauses for approval; auto: the gate decides; dry-run: only compare.",
    )
