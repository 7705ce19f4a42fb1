"""Champion and challenger: propose, promote, reject, roll back. Decisions are lines of the ledger; aliases show them.

proposal = propose(layout)
print(proposal.gate.markdown())
promote(proposal, actor="ada", reason="draws dogs at last")
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline_steps.core.errors import ConfigError, DataError, IntegrityError, ServiceError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.errors import EntryRejectedError
from pipeline_steps.tracking.registry.evaluation_results import compare, data_mismatches, latest_comparable_evaluations
from pipeline_steps.tracking.registry.model_registry import CHALLENGER, CHAMPION, ModelRegistry, ModelVersionInfo
from pipeline_steps.tracking.registry.promotion_gate import GateResult, evaluate_gate, read_gate
from pipeline_steps.tracking.registry.promotion_log import PromotionEvent, PromotionLog
from pipeline_steps.tracking.settings import REGISTERED_MODEL, redact

log = logging.getLogger(__name__)

PROMOTED_TAG = "promotion.line"
SETTLE_ROUNDS = 10
PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class PromotionProposal:
    """A challenger beside the champion, and what the gate says.

    Attributes:
        champion: None when there is none yet.
        challenger: the version that the alias `challenger` points at, or the one asked for.
        gate: may it become champion, and why (not).
        layout: the project.
        seen: lines of the ledger when this was proposed; a promotion after a newer line is refused.
        runs: evaluation runs that were compared (champion's, challenger's).
    """

    champion: ModelVersionInfo | None
    challenger: ModelVersionInfo
    gate: GateResult
    layout: ProjectPaths
    seen: int
    runs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PromotionRecord:
    """What became of it: a line of the ledger.

    Attributes:
        line: its number.
        kind: `promote` or `rollback`.
        version: the champion now.
        former: the champion before.
        actor, reason, time: who, why, when (ISO 8601, UTC).
        run_id: MLflow run that holds the ledger.
    """

    line: int
    kind: str
    version: str
    former: str | None
    actor: str
    reason: str
    time: str
    run_id: str


def propose(layout: ProjectPaths, challenger: str = CHALLENGER) -> PromotionProposal:
    """Compare the challenger with the champion on the same test items. Reads only.

    Args:
        layout: the project.
        challenger: version, alias or run; default: the newest model.

    Raises:
        ConfigError: the gate file is wrong, or nothing was ever tracked.
        DataError: there is no challenger, or it (or the champion) was never evaluated.
        ServiceError: MLflow does not answer.
    """
    gate = read_gate(layout)
    registry = ModelRegistry(layout)
    lines = PromotionLog(registry).lines()
    asked = registry.resolve(challenger)
    number = current_champion(lines, registry.alias(CHAMPION))
    champion = _existing(registry, number)
    if champion is not None and champion.version == asked.version:
        return _refusal(champion, asked, layout, lines, f"version {asked.version} is the champion already")
    runs: tuple[str, ...] = ()
    if champion is None:
        evaluated = registry.evaluations(asked)
        if not evaluated:
            raise DataError(f"version {asked.version} has no evaluation in MLflow", "run: dvc repro --force evaluate")
        runs = (str(evaluated[0].info.run_id),)
        gone = f": version {number} was deleted in MLflow" if number else " yet"
        result = GateResult(True, (f"yes: there is no champion{gone}",))
    else:
        a, b = latest_comparable_evaluations(registry, champion, asked)
        runs = (a.run_id, b.run_id)
        if problems := data_mismatches(a, b):
            cure = f"sonify compare {champion.version} {asked.version} --evaluate judges both on one set"
            said = tuple(f"NO: not judged on the same data: {problem}" for problem in problems)
            return PromotionProposal(champion, asked, GateResult(False, (*said, cure), False), layout, len(lines), runs)
        result = evaluate_gate(gate, compare(a, b))
    if spoken := _said_no(lines, asked.version):
        reasons = (*result.reasons, f"NO: line {spoken.number} of the ledger: {spoken.kind} by {spoken.actor}: {spoken.reason}")
        result = GateResult(False, reasons, result.comparable, result.metrics)
    return PromotionProposal(champion, asked, result, layout, len(lines), runs)


def promote(proposal: PromotionProposal, *, actor: str, reason: str, override: bool = False) -> PromotionRecord:
    """Make the challenger champion. Of two at once one wins, the other is refused.

    Args:
        proposal: what was seen when the decision was made.
        actor: who decides: a person, or the name of a flow.
        reason: why, in words.
        override: promote although the gate says no; it is written down. Evaluations on different data never pass.

    Raises:
        ConfigError: it is the champion already, or nobody is named.
        DataError: the gate is not passed.
        IntegrityError: the evaluations are not of the same data.
        LockedError: somebody else decided since; look again.
        ServiceError: MLflow does not answer. If the line was written, the promotion holds; the alias follows later.
    """
    challenger, champion, gate = proposal.challenger, proposal.champion, proposal.gate
    if champion is not None and champion.version == challenger.version:
        raise ConfigError(f"version {challenger.version} is the champion already", "train another model first")
    if not gate.comparable:
        raise IntegrityError(
            f"version {challenger.version} is not promoted: {'; '.join(gate.reasons)}", "evaluate both on one set"
        )
    if not gate.passed and not override:
        raise DataError(
            f"version {challenger.version} is not promoted: {'; '.join(gate.reasons)}", "or override, with a reason"
        )
    registry = ModelRegistry(proposal.layout)
    details = {
        "md5": challenger.md5,
        "gate_passed": gate.passed,
        "gate": [text[:200] for text in gate.reasons][:12],
        "evaluations": list(proposal.runs),
    }
    former = champion.version if champion else None
    record = _enter(registry, proposal.seen, "promote", challenger.version, former, actor, reason, details)
    if proposal.runs:
        try:
            registry.call(
                lambda: registry.client.log_text(proposal.runs[-1], gate.markdown(), f"promotion/{record.line:04d}.md")
            )
        except (ServiceError, DataError, EntryRejectedError) as error:  # the ledger has the reasons too
            log.warning("the gate's table could not be kept with the evaluation: %s", error)
    return record


def reject(proposal: PromotionProposal, *, actor: str, reason: str) -> None:
    """Write down that the challenger was refused; the champion stays, and no gate passes this version again by itself.

    Raises:
        LockedError: somebody else decided since.
        ConfigError, ServiceError: as for `promote`.
    """
    registry = ModelRegistry(proposal.layout)
    former = proposal.champion.version if proposal.champion else None
    details = {"md5": proposal.challenger.md5, "gate_passed": proposal.gate.passed}
    _enter(registry, proposal.seen, "reject", proposal.challenger.version, former, actor, reason, details)


def rollback(*, layout: ProjectPaths, actor: str, reason: str) -> PromotionRecord:
    """Make the newest champion before this one that MLflow still holds champion again.

    Raises:
        DataError: there is none.
        LockedError: somebody else decided at the same moment.
        ConfigError, ServiceError: as for `promote`.
    """
    registry = ModelRegistry(layout)
    lines = PromotionLog(registry).lines()
    champion, former = _way_back(registry, lines)
    return _enter(registry, len(lines), "rollback", former.version, champion, actor, reason, {"md5": former.md5})


def rollback_target(layout: ProjectPaths) -> tuple[str, str]:
    """The champion's version, and the one that a rollback would make champion.

    Raises:
        DataError: there is no former champion.
    """
    registry = ModelRegistry(layout)
    champion, former = _way_back(registry, PromotionLog(registry).lines())
    return champion, former.version


def _way_back(registry: ModelRegistry, lines: Sequence[PromotionEvent]) -> tuple[str, ModelVersionInfo]:
    *earlier, champion = champion_history(lines) or [""]
    for number in reversed(earlier):
        if number != champion and (former := _existing(registry, number)):
            return champion, former
    raise DataError("there is no former champion to go back to", "sonify promote shows what there is")


def _existing(registry: ModelRegistry, number: str | None) -> ModelVersionInfo | None:
    """A version, or None when somebody deleted it in MLflow."""
    try:
        return registry.version(number) if number else None
    except DataError:
        return None


def history(layout: ProjectPaths) -> list[PromotionEvent]:
    """Every decision, oldest first."""
    return PromotionLog(ModelRegistry(layout)).lines()


def sync_champion_alias(layout: ProjectPaths) -> str | None:
    """Set the alias `champion` to what the ledger says; for a promoter that died in between. Returns the champion's version."""
    registry = ModelRegistry(layout)
    try:
        _show(registry, PromotionLog(registry))
    except DataError as error:  # the champion was deleted in MLflow: the next decision makes another one
        log.warning("%s", error)
    return registry.alias(CHAMPION)


def champion_history(lines: Sequence[PromotionEvent]) -> list[str]:
    """Champions that a rollback can still reach, oldest first; the last one is champion. Pure."""
    stack: list[str] = []
    for line in lines:
        if line.kind == "promote":
            if not stack and line.former:
                stack.append(line.former)  # an alias that was set before there was a ledger
            stack.append(line.version)
        elif line.kind == "rollback":
            stack.pop()
            while stack[-1] != line.version:  # champions that were deleted in MLflow were passed over
                stack.pop()
    return stack


def current_champion(lines: Sequence[PromotionEvent], alias: str | None) -> str | None:
    """The champion's version: what the ledger says; the alias only counts while the ledger says nothing. Pure."""
    stack = champion_history(lines)
    return stack[-1] if stack else alias


def _enter(
    registry: ModelRegistry,
    seen: int,
    kind: str,
    version: str,
    former: str | None,
    actor: str,
    reason: str,
    details: dict[str, object],
) -> PromotionRecord:
    actor, reason = redact(actor.strip()), redact(reason.strip())
    if not actor or not reason:
        raise ConfigError("a decision needs somebody who takes it, and a reason", "give --actor and --reason")
    ledger = PromotionLog(registry)
    line = ledger.append(seen, kind, version, former, actor, reason, details)
    try:
        _show(registry, ledger)
    except ServiceError as error:
        raise ServiceError(
            f"line {line.number} is written ({kind} version {version}), but the alias could not be set: {error.reason}",
            "sonify promote sets it once MLflow answers",
            transient=True,
        ) from error
    return PromotionRecord(line.number, kind, version, former, actor, reason, line.time, ledger.run_id() or "")


def _show(registry: ModelRegistry, ledger: PromotionLog) -> None:
    """Point the alias at the ledger's champion. Whoever sets it looks again afterwards: a slow writer corrects itself."""
    problem: Exception | None = None
    for attempt in range(SETTLE_ROUNDS):
        lines = ledger.lines()
        wanted, shown = current_champion(lines, None), registry.alias(CHAMPION)
        if wanted is None or wanted == shown:
            return
        log.info("alias %s: %s -> %s", CHAMPION, shown, wanted)
        last = next(line for line in reversed(lines) if line.kind != "reject")
        note = f"{last.number:04d} {last.kind} by {last.actor}"[:500]
        time.sleep(PAUSE_S * attempt)
        try:
            _point(registry, wanted, note)
        except EntryRejectedError as error:  # two that make the alias in the same moment: one is refused by the database
            problem = error
        except DataError as error:
            raise DataError(f"version {wanted} cannot be champion: {error.reason}", "sonify rollback") from error
    raise ServiceError(f"the alias {CHAMPION} could not be set: {problem}", "sonify promote tries again", transient=True)


def _point(registry: ModelRegistry, version: str, note: str) -> None:
    client = registry.client
    registry.call(lambda: client.set_registered_model_alias(REGISTERED_MODEL, CHAMPION, version))
    registry.call(lambda: client.set_model_version_tag(REGISTERED_MODEL, version, PROMOTED_TAG, note))


def _said_no(lines: Sequence[PromotionEvent], version: str) -> PromotionEvent | None:
    """The last line if it speaks against this version: a rejection, or a rollback from it."""
    verdict = None
    for line in lines:
        if (line.kind, version) in {("reject", line.version), ("rollback", line.former)}:
            verdict = line
        elif line.kind == "promote" and line.version == version:
            verdict = None
    return verdict


def _refusal(
    champion: ModelVersionInfo, asked: ModelVersionInfo, layout: ProjectPaths, lines: Sequence[PromotionEvent], reason: str
) -> PromotionProposal:
    return PromotionProposal(champion, asked, GateResult(False, (f"NO: {reason}",)), layout, len(lines))
