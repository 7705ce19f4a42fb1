"""The forms of the UI: flat pydantic models; stages and presets are choices read from the project."""

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
    """An enumeration the form shows as a list to choose from; free text where the project is not at hand."""
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
        description="Stages to bring up to date, with all they depend on; none chosen: all.",
    )


class RunParameters(_Form):
    """What a run does. Everything left as it is: bring the committed state up to date."""

    preset: Preset = Field(
        default=Preset(AS_COMMITTED),
        title="Preset",
        description="Parameters to start from: params.yaml as committed, or a file of presets/.",
    )
    overrides: list[str] = Field(
        default_factory=list,
        title="Parameter overrides",
        description="One KEY=VALUE a line on top of the preset, for this run alone: section.key=value.",
    )
    seed: int = Field(
        default=-1, ge=-1, title="Seed", description="Put into every parameter named seed; -1 leaves them as they are."
    )
    force: bool = Field(default=False, title="Force", description="Run the stages even when nothing has changed.")
    revision: str = Field(
        default="HEAD",
        min_length=1,
        pattern=r"^[A-Za-z0-9_./@^~{}-]+$",
        title="Revision",
        description="Git revision to run: HEAD, a commit, or a run branch (runs/NAME) to go on from its results.",
    )
    wait_minutes: int = Field(
        default=60, ge=0, le=10_080, title="Wait", description="Minutes to wait for another run in this workspace to end."
    )

    @field_validator("revision")
    @classmethod
    def _no_option(cls, value: str) -> str:
        if value.startswith("-"):
            raise ValueError("a revision does not begin with a dash")
        return value

    def request(self) -> RunRequest:
        """The part that concerns parameters."""
        preset = "" if str(self.preset) == AS_COMMITTED else str(self.preset)
        overrides = tuple(line.strip() for line in self.overrides if line.strip())
        return RunRequest(preset, overrides, None if self.seed < 0 else self.seed, self.revision)


class ReproduceParameters(RunParameters, _StageChoice):
    """A run of chosen stages."""


class PromotionMode(enum.StrEnum):
    """Who decides about a challenger."""

    manual = "manual"
    auto = "auto"
    dry_run = "dry-run"


class PromoteParameters(_Form):
    """How champion and challenger are decided."""

    mode: PromotionMode = Field(
        default=PromotionMode.manual,
        title="Mode",
        description="manual: the run pauses and asks; auto: the gate decides; dry-run: only the comparison.",
    )
    timeout_hours: float = Field(
        default=72.0, gt=0, le=720, title="Time-out", description="Hours to wait for an answer; after that nothing changes."
    )


class NightlyParameters(RunParameters):
    """Everything, then the promotion."""

    promotion: PromotionMode = Field(
        default=PromotionMode.manual,
        title="Promotion",
        description="manual: a promotion run is started that pauses and asks; auto: the gate decides; dry-run: only report.",
    )
