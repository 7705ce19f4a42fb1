"""Automation that marks runs without a heartbeat as crashed: `python -m flows.automations`."""

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
"""Prefect's smallest interval, set by PREFECT_FLOWS_HEARTBEAT_FREQUENCY."""
MAX_MISSED = 3
"""Missing heartbeats after which a run is marked; one may be late on a loaded machine."""

STATES_WITHOUT_HEARTBEAT = (
    *("Completed", "Failed", "Cancelled", "Crashed", "Paused", "Suspended", "Scheduled", "Late", "AwaitingRetry", "Pending"),
)


def zombie_flow_automation(heartbeat_s: int = HEARTBEAT_S) -> Automation:
    """Automation that expects another heartbeat or a state without heartbeat within three intervals."""
    expected = {"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{state}" for state in STATES_WITHOUT_HEARTBEAT)}
    text = f"No heartbeat for {heartbeat_s * MAX_MISSED} s."
    return Automation(
        name=NAME,
        description="Marks runs whose process or machine was killed and cannot report it.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect=expected,
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=heartbeat_s * MAX_MISSED),
        ),
        actions=[ChangeFlowRunState(name="Crashed", state=StateType.CRASHED, message=text, force=False)],
    )


def ensure_automation(heartbeat_s: int = HEARTBEAT_S) -> str:
    """Create or update the automation on the server; returns `created` or `updated`."""
    automation = zombie_flow_automation(heartbeat_s)
    try:
        existing = cast(Automation, Automation.read(name=NAME))
    except ValueError:
        automation.create()
        return "created"
    automation.id = existing.id
    automation.update()
    return "updated"


if __name__ == "__main__":
    print(f"{NAME}: {ensure_automation()}")
