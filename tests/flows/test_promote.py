"""Tests of flow `promote` with a fake registry that records calls."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline_steps.core.errors import LockedError, ServiceError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.registry.model_registry import ModelVersionInfo
from pipeline_steps.tracking.registry.promotion import PromotionProposal
from pipeline_steps.tracking.registry.promotion_gate import GateResult
from pipeline_steps.tracking.registry.promotion_log import PromotionEvent

OLD = ModelVersionInfo("1", "a" * 32 + ".dir", None)
NEW = ModelVersionInfo("2", "b" * 32 + ".dir", "http://127.0.0.1:5000/#/models/audio2image/versions/2")


class FakeRegistry:
    """Registry that returns one proposal and records calls."""

    def __init__(self, passed: bool, comparable: bool = True, champion: ModelVersionInfo | None = OLD) -> None:
        gate = GateResult(passed, ("yes: better" if passed else "NO: worse",), comparable)
        self.proposal = PromotionProposal(champion, NEW, gate, ProjectPaths(Path()), 0)
        self.calls: list[tuple[str, str, str, bool]] = []

    def propose(self, _layout: ProjectPaths) -> PromotionProposal:
        return self.proposal

    def promote(self, proposal: PromotionProposal, *, actor: str, reason: str, override: bool = False) -> PromotionEvent:
        self.calls.append(("promote", actor, reason, override))
        return PromotionEvent(1, "promote", proposal.challenger.version, "1", actor, reason, "", {}, "")

    def reject(self, _proposal: PromotionProposal, *, actor: str, reason: str) -> None:
        self.calls.append(("reject", actor, reason, False))


def install(monkeypatch: pytest.MonkeyPatch, registry: FakeRegistry) -> None:
    import flows.promote

    monkeypatch.setattr(flows.promote, "propose", registry.propose)
    monkeypatch.setattr(flows.promote, "make_champion", registry.promote)
    monkeypatch.setattr(flows.promote, "reject", registry.reject)
    monkeypatch.setattr(flows.promote, "POLL_S", 1)


def run(**parameters: Any) -> Any:
    from flows.promote import promote

    return promote(parameters=parameters, return_state=True)


def answer(run_input: dict[str, str]) -> threading.Thread:
    """Answer the next paused run, as the UI does."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import StateType
    from prefect.flow_runs import resume_flow_run

    def work() -> None:
        chosen = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PAUSED])))
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with get_client(sync_client=True) as client:
                paused = client.read_flow_runs(flow_run_filter=chosen)
            if paused:
                time.sleep(0.3)  # the form is saved just after the state
                resume_flow_run(paused[0].id, run_input=run_input)
                return
            time.sleep(0.2)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


class Deployed:
    """Run of a deployment, as a worker executes it: suspended for an approval and started again after the answer."""

    def __init__(self) -> None:
        from prefect.client.orchestration import get_client

        from flows.promote import promote

        self._flow = promote
        with get_client(sync_client=True) as client:
            self._deployment = client.create_deployment(client.create_flow(promote), name="deployed")
            asked = {"parameters": {"mode": "manual"}}
            self._id = client.create_flow_run_from_deployment(self._deployment, parameters=asked).id

    def start(self) -> Any:
        """Run until the flow ends or is suspended; returns the state."""
        from prefect.client.orchestration import get_client
        from prefect.exceptions import Pause
        from prefect.flow_engine import run_flow

        with get_client(sync_client=True) as client:
            found = client.read_flow_run(self._id)
            with suppress(Pause):
                run_flow(self._flow, flow_run=found, parameters=found.parameters, return_type="state")
            return client.read_flow_run(self._id).state

    def answer(self, **run_input: str) -> str:
        """Answer through the API; returns the status of the response."""
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            return str(client._client.post(f"/flow_runs/{self._id}/resume", json={"run_input": run_input}).json()["status"])

    def retry(self) -> None:
        """Set the state that *Retry* on the page of a failed run sets."""
        from prefect.client.orchestration import get_client
        from prefect.states import AwaitingRetry

        with get_client(sync_client=True) as client:
            client.set_flow_run_state(self._id, AwaitingRetry())

    def delete(self) -> None:
        """Delete the run, because other tests search for paused runs."""
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            client.delete_flow_run(self._id)
            client._client.delete(f"/deployments/{self._deployment}")


@pytest.fixture
def deployed(prefect_api: str) -> Iterator[Deployed]:
    run = Deployed()
    yield run
    run.delete()


@pytest.mark.usefixtures("project")
class TestDeployed:
    def test_answers_apply_only_to_the_shown_proposal(self, monkeypatch: pytest.MonkeyPatch, deployed: Deployed) -> None:
        registry, run = FakeRegistry(False), deployed
        install(monkeypatch, registry)
        assert run.start().name == "Suspended"
        newer = ModelVersionInfo("3", "c" * 32 + ".dir", None)
        registry.proposal = replace(registry.proposal, challenger=newer)
        assert run.answer(decision="approve", reason="I looked at version 2", name="Ada") == "ACCEPT"
        assert run.start().name == "Suspended", "another challenger needs another approval"
        assert registry.calls == []
        registry.proposal = replace(registry.proposal, num_events=1)  # another decision meanwhile
        assert run.answer(decision="approve", reason="I looked at version 3", name="Ada") == "ACCEPT"
        assert run.start().name == "Suspended"
        assert registry.calls == []
        assert run.answer(decision="approve", reason="I looked again", name="Ada") == "ACCEPT"
        assert run.start().message == "version 3 is champion now, approved by Ada (entry 1 of the promotion log)"
        assert registry.calls == [("promote", "Ada", "I looked again", True)]

    def test_answer_to_the_same_proposal_is_accepted(self, monkeypatch: pytest.MonkeyPatch, deployed: Deployed) -> None:
        registry, run = FakeRegistry(True), deployed
        install(monkeypatch, registry)
        assert run.start().name == "Suspended"
        assert run.answer(decision="perhaps", reason="x", name="") == "REJECT"
        assert run.answer(decision="reject", reason="too blurred", name="Ben") == "ACCEPT"
        assert run.start().message == "version 2 was rejected by Ben: too blurred; the champion stays"

    def test_failed_decision_is_requested_again(self, monkeypatch: pytest.MonkeyPatch, deployed: Deployed) -> None:
        registry, run = FakeRegistry(True), deployed
        install(monkeypatch, registry)
        with monkeypatch.context() as patch:
            patch.setattr("flows.promote.make_champion", unavailable)
            assert run.start().name == "Suspended"
            assert run.answer(decision="approve", reason="better", name="Ada") == "ACCEPT"
            assert run.start().message == "MLflow does not answer -> try again"
        run.retry()
        assert run.start().name == "Suspended"
        assert run.answer(decision="approve", reason="still better", name="Ada") == "ACCEPT"
        assert run.start().message == "version 2 is champion now, approved by Ada (entry 1 of the promotion log)"
        assert registry.calls == [("promote", "Ada", "still better", False)]


def unavailable(*_: object, **__: object) -> PromotionEvent:
    raise ServiceError("MLflow does not answer", "try again")


@pytest.mark.usefixtures("prefect_api", "project")
class TestDecisions:
    def test_dry_run_and_auto(self, monkeypatch: pytest.MonkeyPatch) -> None:
        better, worse = FakeRegistry(True), FakeRegistry(False)
        install(monkeypatch, better)
        assert run(mode="dry-run").message == "dry run: version 2: the gate is passed"
        assert better.calls == []
        assert run(mode="auto").message == "version 2 is champion now (entry 1 of the promotion log)"
        assert better.calls == [("promote", "gate", "the gate is passed (auto)", False)]
        install(monkeypatch, worse)
        assert run(mode="auto").message == "version 2 is not promoted: the gate is not passed; the champion stays"
        assert worse.calls == []

    def test_manual_approval_and_rejection(self, monkeypatch: pytest.MonkeyPatch) -> None:
        registry = FakeRegistry(False)
        install(monkeypatch, registry)
        thread = answer({"decision": "approve", "reason": "needed for the fair", "name": "Ada"})
        state = run(mode="manual")
        thread.join()
        assert state.message == "version 2 is champion now, approved by Ada (entry 1 of the promotion log)"
        assert registry.calls == [("promote", "Ada", "needed for the fair", True)], "against the gate: an override"
        thread = answer({"decision": "reject", "reason": "too blurred", "name": "Ben"})
        state = run(mode="manual")
        thread.join()
        assert state.message == "version 2 was rejected by Ben: too blurred; the champion stays"
        assert registry.calls[1:] == [("reject", "Ben", "too blurred", False)]

    def test_timeout_of_the_approval(self, monkeypatch: pytest.MonkeyPatch) -> None:
        registry = FakeRegistry(True)
        install(monkeypatch, registry)
        state = run(mode="manual", timeout_hours=1.0 / 3600)
        assert state.is_failed()
        assert registry.calls == []

    def test_proposals_without_a_decision(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for registry, message in (
            (FakeRegistry(True, champion=NEW), "version 2 is the champion already"),
            (FakeRegistry(False, comparable=False), "cannot be compared"),
        ):
            install(monkeypatch, registry)
            assert message in run(mode="manual").message
            assert registry.calls == []

    def test_nightly_requests_approval_in_another_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from prefect import flow

        from flows.flow_parameters import PromotionMode
        from flows.promote import decide_promotion, final_state

        registry = FakeRegistry(True)
        install(monkeypatch, registry)
        asked = flow(lambda: final_state(lambda: decide_promotion(PromotionMode.manual, wait_here=False)), name="night")(
            return_state=True
        )
        assert asked.is_failed()
        assert "version 2 awaits approval, but there is no deployment promote/promote" in asked.message
        assert registry.calls == []

    def test_concurrent_decision_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        registry = FakeRegistry(True)
        install(monkeypatch, registry)

        def lost(*_: object, **__: object) -> PromotionEvent:
            raise LockedError("Eve decided a moment ago", "look again")

        monkeypatch.setattr("flows.promote.make_champion", lost)
        state = run(mode="auto")
        assert state.is_failed()
        assert state.message == "Eve decided a moment ago -> look again"


def test_approval_form() -> None:
    from flows.promote import PromotionDecision, describe

    text = describe(FakeRegistry(False).proposal)
    assert "[version 2 (" in text
    assert "recorded as an override" in text
    assert "**Champion**: none" in describe(FakeRegistry(True, champion=None).proposal)
    with pytest.raises(ValueError, match="Input should be 'approve' or 'reject'"):
        PromotionDecision(decision="maybe", reason="long enough", name="Ada")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 3"):
        PromotionDecision(decision="reject", reason="", name="Ada")
