"""Flow `promote`: compare challenger and champion, then promote by approval, automatically, or not at all (dry run)."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Literal, cast
from uuid import UUID

from prefect import flow, get_run_logger, pause_flow_run, suspend_flow_run
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.input import RunInput, keyset_from_paused_state
from prefect.runtime import deployment, flow_run
from prefect.states import Completed, Failed, Suspended
from pydantic import Field

from flows.flow_parameters import PromoteParameters, PromotionMode
from flows.git_worktree import find_project
from flows.stage_task import ignore_api_errors
from pipeline_steps.core.errors import ConfigError, StageError
from pipeline_steps.core.escape import escape_markdown
from pipeline_steps.core.hashing import sha256_bytes
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.client.uploader import BUSY, sync
from pipeline_steps.tracking.registry.model_registry import ModelVersionInfo
from pipeline_steps.tracking.registry.promotion import PromotionProposal, propose, reject
from pipeline_steps.tracking.registry.promotion import promote as make_champion
from pipeline_steps.tracking.settings import redact

DEPLOYMENT = "promote/promote"
POLL_S = 5
MAX_SYNC_ATTEMPTS = 12


class PromotionDecision(RunInput):
    """Form of a paused promotion."""

    decision: Literal["approve", "reject"] = Field(description="approve: the challenger becomes champion.")
    reason: str = Field(min_length=3, max_length=500, description="Reason, recorded in the promotion log.")
    name: str = Field(min_length=1, max_length=100, description="Your name, recorded in the promotion log.")


@flow(name="promote", description="Compare challenger and champion, then promote by approval, by the gate, or not (dry run).")
def promote(parameters: PromoteParameters = PromoteParameters()) -> State[None]:  # noqa: B008 - a frozen model
    """Decide the promotion of the challenger. After a timeout or a rejection the champion stays."""
    return final_state(lambda: decide_promotion(parameters.mode, wait_here=True, timeout_hours=parameters.timeout_hours))


def final_state(work: Callable[[], str]) -> State[None]:
    """Final state of a flow: the message that `work` returns, or the one-line error without a traceback."""
    try:
        return Completed(message=work())
    except StageError as error:
        line = redact(str(error))
        get_run_logger().error("%s", line)
        text = f"**{escape_markdown(line)}**\n\nExit code {error.exit_code} ({error.kind})."
        ignore_api_errors(create_markdown_artifact, text, key="failure", description="Why this run failed")
        return Failed(message=line)


def decide_promotion(mode: PromotionMode, *, wait_here: bool, timeout_hours: float = 72.0) -> str:
    """Decide the promotion or request an approval, which expires after `timeout_hours`; returns a message with the result.

    In manual mode, `wait_here` pauses this run; otherwise the deployment `promote` is started, which pauses its own run.

    Raises:
        StageError: there is no challenger or evaluation, MLflow is unavailable, or another decision was made meanwhile.
    """
    log = get_run_logger()
    layout = ProjectPaths(find_project())
    _flush_tracking(layout)
    proposal = propose(layout)
    text = describe(proposal)
    ignore_api_errors(create_markdown_artifact, text, key="promotion", description="Challenger compared with champion")
    challenger = f"version {proposal.challenger.version}"
    if proposal.champion is not None and proposal.champion.version == proposal.challenger.version:
        return f"{challenger} is the champion already"
    log.info("%s", proposal.gate.markdown())
    verdict = "the gate is passed" if proposal.gate.passed else "the gate is not passed"
    if mode == PromotionMode.dry_run:
        return f"dry run: {challenger}: {verdict}"
    if mode == PromotionMode.auto:
        if not proposal.gate.passed:
            return f"{challenger} is not promoted: {verdict}; the champion stays"
        record = make_champion(proposal, actor="gate", reason=f"{verdict} (auto)")
        return f"version {record.version} is champion now (entry {record.number} of the promotion log)"
    if not proposal.gate.comparable:
        return f"{challenger} cannot be compared with the champion; the champion stays"
    if proposal.gate.at_chance:
        return f"{challenger} is not above chance; the champion stays"
    if not wait_here:
        return _start_approval_run(challenger)
    return _apply(proposal, _request_approval(text, _proposal_fingerprint(proposal), timeout_hours))


def _flush_tracking(layout: ProjectPaths) -> None:
    """Upload entries that stages left in the offline queues; the new model version may be among them."""
    problems: dict[str, str] = {}
    for _ in range(MAX_SYNC_ATTEMPTS):
        problems = sync(layout)
        if BUSY not in problems.values():
            break
        time.sleep(POLL_S)
    if problems:
        get_run_logger().warning("tracking entries were not uploaded to MLflow: %s", redact(next(iter(problems.values()))))


def _proposal_fingerprint(proposal: PromotionProposal) -> str:
    """Key of an approval request. It changes with the proposal, so that an answer only applies to what was shown."""
    champion = proposal.champion.version if proposal.champion else None
    shown = repr((champion, proposal.challenger.version, proposal.challenger.md5, proposal.runs, proposal.gate.passed))
    return f"decision-{proposal.num_events}-{proposal.challenger.version}-{sha256_bytes(shown.encode())[:12]}"


def _request_approval(text: str, key: str, timeout_hours: float) -> PromotionDecision:
    """Pause the run for an approval. A deployed run is suspended: its process ends and the answer starts it again.

    Prefect stores the answer under `key`. A resumed run that finds another model, evaluation or entry in the promotion log uses
    another key and is suspended again.
    """
    form = PromotionDecision.with_initial_data(description=text)
    seconds = max(1, int(timeout_hours * 3600))
    if deployment.get_id():
        _delete_old_answer(key)
        return suspend_flow_run(wait_for_input=form, timeout=seconds, key=key)
    return pause_flow_run(wait_for_input=form, timeout=seconds, poll_interval=POLL_S, key=key)


def _delete_old_answer(key: str) -> None:
    """Delete the answer of a failed attempt; Prefect refuses a second answer under the same key after *Retry*."""
    with get_client(sync_client=True) as client:
        run_id = UUID(str(flow_run.get_id()))
        if key not in (client.read_flow_run(run_id).empirical_policy.pause_keys or ()):
            answer = keyset_from_paused_state(Suspended(pause_key=key))["response"]
            with suppress(PrefectHTTPStatusError):  # no answer exists
                client.delete_flow_run_input(run_id, answer)


def _apply(proposal: PromotionProposal, answer: PromotionDecision) -> str:
    version = proposal.challenger.version
    if answer.decision == "reject":
        reject(proposal, actor=answer.name, reason=answer.reason)
        return f"version {version} was rejected by {answer.name}: {answer.reason}; the champion stays"
    record = make_champion(proposal, actor=answer.name, reason=answer.reason, override=not proposal.gate.passed)
    return f"version {record.version} is champion now, approved by {record.actor} (entry {record.number} of the promotion log)"


def _start_approval_run(challenger: str) -> str:
    asked = {"parameters": {"mode": "manual"}}
    try:
        run = cast(FlowRun, run_deployment(DEPLOYMENT, parameters=asked, timeout=0, as_subflow=False))
    except ObjectNotFound as error:
        raise ConfigError(
            f"{challenger} awaits approval, but there is no deployment {DEPLOYMENT}", "run: python -m flows.serve"
        ) from error
    return f"{challenger} awaits approval in run {run.name}"


def describe(proposal: PromotionProposal) -> str:
    """Comparison as Markdown, for the artifact and the approval form."""
    champion = proposal.champion
    lines = [
        f"**Challenger**: {_version_link(proposal.challenger)}",
        "",
        f"**Champion**: {_version_link(champion) if champion else 'none'}",
        "",
        proposal.gate.markdown(),
    ]
    if champion is not None and not proposal.gate.passed:
        lines += ["", "The gate is not passed. An approval overrides it and is recorded as an override."]
    return "\n".join(lines)


def _version_link(version: ModelVersionInfo) -> str:
    text = f"version {escape_markdown(version.version)} ({escape_markdown(version.md5)})"
    return f"[{text}]({version.url})" if version.url else text
