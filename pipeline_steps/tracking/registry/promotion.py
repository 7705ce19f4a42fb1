"""Promotion of models: propose, promote, reject, roll back. Decisions are entries of the promotion log."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline_steps.core.errors import ConfigError, DataError, IntegrityError, ServiceError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.errors import EntryRejectedError
from pipeline_steps.tracking.registry.evaluation_results import (
    compare,
    data_mismatches,
    latest_comparable_evaluations,
    load_evaluation_run,
)
from pipeline_steps.tracking.registry.model_registry import ModelRegistry, ModelVersionInfo
from pipeline_steps.tracking.registry.promotion_gate import GateResult, check_floor, evaluate_gate, read_gate
from pipeline_steps.tracking.registry.promotion_log import PromotionEvent, PromotionLog
from pipeline_steps.tracking.settings import CHALLENGER, CHAMPION, REGISTERED_MODEL, redact

log = logging.getLogger(__name__)

PROMOTED_TAG = "promotion.line"
MAX_ALIAS_ATTEMPTS = 10
PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class PromotionProposal:
    """A challenger, the champion and the result of the gate."""

    champion: ModelVersionInfo | None  # current champion; None if there is none
    challenger: ModelVersionInfo  # version with the alias `challenger`, or the requested version
    gate: GateResult  # result of the promotion gate
    layout: ProjectPaths  # paths of the project
    # entries of the promotion log at the time of the proposal; a decision is refused if the log has grown since
    num_events: int
    runs: tuple[str, ...] = ()  # compared evaluation runs (champion's, challenger's)


def propose(layout: ProjectPaths, challenger: str = CHALLENGER) -> PromotionProposal:
    """Compare the challenger (version, alias or run; default: the newest model) with the champion. Reads only.

    Raises:
        ConfigError: the gate file is not valid, or nothing was tracked.
        DataError: there is no challenger, or the challenger or the champion was never evaluated.
        ServiceError: MLflow does not answer.
    """
    gate = read_gate(layout)
    registry = ModelRegistry(layout)
    events = PromotionLog(registry).events()
    info = registry.resolve(challenger)
    number = current_champion(events, registry.aliases().get(CHAMPION))
    champion = _find_version(registry, number)
    if champion is not None and champion.version == info.version:
        result = GateResult(False, (f"NO: version {info.version} is the champion already",))
        return PromotionProposal(champion, info, result, layout, len(events))
    if champion is None:
        evaluations = registry.evaluations(info)
        if not evaluations:
            raise DataError(f"version {info.version} has no evaluation in MLflow", "run: dvc repro --force evaluate")
        latest = load_evaluation_run(registry, evaluations[0])
        runs: tuple[str, ...] = (latest.run_id,)
        deleted = f": version {number} was deleted in MLflow" if number else " yet"
        result = GateResult(True, (f"yes: there is no champion{deleted}",))
    else:
        a, b = latest_comparable_evaluations(registry, champion, info)
        latest, runs = b, (a.run_id, b.run_id)
        if problems := data_mismatches(a, b):
            reasons = [f"NO: not evaluated on the same data: {problem}" for problem in problems]
            reasons.append(f"run: sonify compare {champion.version} {info.version} --evaluate")
            return PromotionProposal(champion, info, GateResult(False, tuple(reasons), False), layout, len(events), runs)
        result = evaluate_gate(gate, compare(a, b))
    floor = check_floor(gate, latest.values)
    result = replace(
        result, passed=result.passed and floor.passed, reasons=(*result.reasons, *floor.reasons), at_chance=floor.at_chance
    )
    if refusal := _last_refusal(events, info.version):
        reason = f"NO: entry {refusal.number} of the promotion log: {refusal.kind} by {refusal.actor}: {refusal.reason}"
        result = replace(result, passed=False, reasons=(*result.reasons, reason))
    return PromotionProposal(champion, info, result, layout, len(events), runs)


def promote(proposal: PromotionProposal, *, actor: str, reason: str, override: bool = False) -> PromotionEvent:
    """Make the challenger champion. Of two concurrent promotions one is refused.

    With `override` it is promoted although the gate is not passed. Incomparable evaluations and a win rate at chance cannot be
    overridden.

    Raises:
        ConfigError: the challenger is the champion already, or actor or reason is empty.
        DataError: the gate is not passed, or the challenger is at chance.
        IntegrityError: the evaluations are not comparable.
        LockedError: another decision was made since the proposal.
        ServiceError: MLflow does not answer. If the entry was written, the promotion is valid and the alias follows later.
    """
    challenger, champion, gate = proposal.challenger, proposal.champion, proposal.gate
    if champion is not None and champion.version == challenger.version:
        raise ConfigError(f"version {challenger.version} is the champion already", "train another model first")
    refusal = f"version {challenger.version} is not promoted: {'; '.join(gate.reasons)}"
    if not gate.comparable:
        raise IntegrityError(refusal, "evaluate both on the same data")
    if gate.at_chance:
        raise DataError(refusal, "train a better model, or enlarge the test set: sonify report shows its intervals")
    if not gate.passed and not override:
        raise DataError(refusal, "override the gate with a reason, or train a better model")
    registry = ModelRegistry(proposal.layout)
    details = {
        "md5": challenger.md5,
        "gate_passed": gate.passed,
        "gate": [text[:200] for text in gate.reasons][:12],
        "evaluations": list(proposal.runs),
    }
    former = champion.version if champion else None
    event = _record_decision(registry, proposal.num_events, "promote", challenger.version, former, actor, reason, details)
    if proposal.runs:
        try:
            registry.call(registry.client.log_text, proposal.runs[-1], gate.markdown(), f"promotion/{event.number:04d}.md")
        except (ServiceError, DataError, EntryRejectedError) as error:  # the promotion log has the reasons too
            log.warning("the table of the gate could not be logged to the evaluation run: %s", error)
    return event


def reject(proposal: PromotionProposal, *, actor: str, reason: str) -> None:
    """Record that the challenger was rejected. The champion stays; the gate does not pass for this version again.

    Raises:
        LockedError: another decision was made since the proposal.
        ConfigError, ServiceError: as for `promote`.
    """
    registry = ModelRegistry(proposal.layout)
    former = proposal.champion.version if proposal.champion else None
    details = {"md5": proposal.challenger.md5, "gate_passed": proposal.gate.passed}
    _record_decision(registry, proposal.num_events, "reject", proposal.challenger.version, former, actor, reason, details)


def rollback(*, layout: ProjectPaths, actor: str, reason: str) -> PromotionEvent:
    """Make the newest former champion that MLflow still has champion again.

    Raises:
        DataError: there is no former champion.
        LockedError: another decision was made at the same time.
        ConfigError, ServiceError: as for `promote`.
    """
    registry = ModelRegistry(layout)
    events = PromotionLog(registry).events()
    champion, former = _find_rollback_target(registry, events)
    return _record_decision(registry, len(events), "rollback", former.version, champion, actor, reason, {"md5": former.md5})


def rollback_target(layout: ProjectPaths) -> tuple[str, str]:
    """Version of the champion, and the version that a rollback would make champion.

    Raises:
        DataError: there is no former champion.
    """
    registry = ModelRegistry(layout)
    champion, former = _find_rollback_target(registry, PromotionLog(registry).events())
    return champion, former.version


def _find_rollback_target(registry: ModelRegistry, events: Sequence[PromotionEvent]) -> tuple[str, ModelVersionInfo]:
    *earlier, champion = champion_history(events) or [""]
    for number in reversed(earlier):
        if number != champion and (former := _find_version(registry, number)):
            return champion, former
    raise DataError("there is no former champion", "list the decisions: sonify promote --history")


def _find_version(registry: ModelRegistry, number: str | None) -> ModelVersionInfo | None:
    """A version; None if it was deleted in MLflow."""
    try:
        return registry.version(number) if number else None
    except DataError:
        return None


def history(layout: ProjectPaths) -> list[PromotionEvent]:
    """All decisions, oldest first."""
    return PromotionLog(ModelRegistry(layout)).events()


def sync_champion_alias(layout: ProjectPaths) -> str | None:
    """Reset the alias `champion` from the promotion log, in case an earlier promotion was interrupted.

    Returns:
        Version of the champion; None if there is none.
    """
    registry = ModelRegistry(layout)
    try:
        _sync_alias(registry, PromotionLog(registry))
    except DataError as error:  # the champion was deleted in MLflow; the next decision sets another one
        log.warning("%s", error)
    return registry.aliases().get(CHAMPION)


def champion_history(events: Sequence[PromotionEvent]) -> list[str]:
    """Champions that a rollback can still reach, oldest first; the last one is the current champion. Pure."""
    stack: list[str] = []
    for event in events:
        if event.kind == "promote":
            if not stack and event.former:
                stack.append(event.former)  # an alias that was set before the log existed
            stack.append(event.version)
        elif event.kind == "rollback":
            stack.pop()
            while stack[-1] != event.version:  # a rollback skips champions that were deleted in MLflow
                stack.pop()
    return stack


def current_champion(events: Sequence[PromotionEvent], alias: str | None) -> str | None:
    """Version of the champion by the promotion log; the alias if the log has no champion. Pure."""
    stack = champion_history(events)
    return stack[-1] if stack else alias


def _record_decision(
    registry: ModelRegistry,
    num_events: int,
    kind: str,
    version: str,
    former: str | None,
    actor: str,
    reason: str,
    details: dict[str, object],
) -> PromotionEvent:
    actor, reason = redact(actor.strip()), redact(reason.strip())
    if not actor or not reason:
        raise ConfigError("a decision needs an actor and a reason", "give --actor and --reason")
    promotion_log = PromotionLog(registry)
    event = promotion_log.append(num_events, kind, version, former, actor, reason, details)
    try:
        _sync_alias(registry, promotion_log)
    except ServiceError as error:
        raise ServiceError(
            f"entry {event.number} is written ({kind} version {version}), but the alias could not be set: {error.reason}",
            "run sonify promote when MLflow answers",
            transient=True,
        ) from error
    return event


def _sync_alias(registry: ModelRegistry, promotion_log: PromotionLog) -> None:
    """Set the alias to the champion of the log. Each write is checked again, so that a slow writer corrects itself."""
    problem: Exception | None = None
    for attempt in range(MAX_ALIAS_ATTEMPTS):
        events = promotion_log.events()
        champion, alias = current_champion(events, None), registry.aliases().get(CHAMPION)
        if champion is None or champion == alias:
            return
        log.info("alias %s: %s -> %s", CHAMPION, alias, champion)
        last = next(event for event in reversed(events) if event.kind != "reject")
        note = f"{last.number:04d} {last.kind} by {last.actor}"[:500]
        time.sleep(PAUSE_S * attempt)
        try:
            _set_alias(registry, champion, note)
        except EntryRejectedError as error:  # of two processes that create the alias at once the database refuses one
            problem = error
        except DataError as error:
            raise DataError(f"version {champion} cannot be champion: {error.reason}", "run: sonify rollback") from error
    raise ServiceError(f"the alias {CHAMPION} could not be set: {problem}", "run sonify promote again", transient=True)


def _set_alias(registry: ModelRegistry, version: str, note: str) -> None:
    registry.call(registry.client.set_registered_model_alias, REGISTERED_MODEL, CHAMPION, version)
    registry.call(registry.client.set_model_version_tag, REGISTERED_MODEL, version, PROMOTED_TAG, note)


def _last_refusal(events: Sequence[PromotionEvent], version: str) -> PromotionEvent | None:
    """Last rejection of a version or rollback from it; None if it was promoted afterwards."""
    refusal = None
    for event in events:
        if (event.kind, version) in {("reject", event.version), ("rollback", event.former)}:
            refusal = event
        elif event.kind == "promote" and event.version == version:
            refusal = None
    return refusal
