"""What the server does by itself: a run that has shown no sign of life is marked as crashed. `python -m flows.automations`."""

from __future__ import annotations

from datetime import timedelta
from typing import cast

from prefect.automations import Automation
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

NAME = "Runs without a heartbeat are crashed"
HEARTBEAT_S = 30
"""Prefect's smallest interval; the flows' environment sets it (PREFECT_FLOWS_HEARTBEAT_FREQUENCY)."""
MISSED = 3
"""Heartbeats that must be missing: one may be late on a loaded machine."""

QUIET = ("Completed", "Failed", "Cancelled", "Crashed", "Paused", "Suspended", "Scheduled", "Late", "AwaitingRetry", "Pending")
"""States in which no heartbeat is owed."""


def zombie_automation(heartbeat_s: int = HEARTBEAT_S) -> Automation:
    """After a heartbeat another one, or the news that the run has ended or waits, must come within three intervals."""
    expected = {"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{state}" for state in QUIET)}
    text = f"No heartbeat for {heartbeat_s * MISSED} s."
    return Automation(
        name=NAME,
        description="kill -9 of a process, a machine that went away: nobody is left to say so.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect=expected,
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=heartbeat_s * MISSED),
        ),
        actions=[ChangeFlowRunState(name="Crashed", state=StateType.CRASHED, message=text, force=False)],
    )


def ensure_automation(heartbeat_s: int = HEARTBEAT_S) -> str:
    """Make or refresh the automation on the server; returns `created` or `updated`."""
    wanted = zombie_automation(heartbeat_s)
    try:
        known = cast(Automation, Automation.read(name=NAME))
    except ValueError:
        wanted.create()
        return "created"
    wanted.id = known.id
    wanted.update()
    return "updated"


if __name__ == "__main__":
    print(f"{NAME}: {ensure_automation()}")
