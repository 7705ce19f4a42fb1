"""`sonify promote` and `sonify rollback`: change the champion. Every decision is recorded in the promotion log."""

from __future__ import annotations

import getpass
import socket
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline_steps.commands.console import JsonFlag, handle_errors, layout_of, print_result
from pipeline_steps.core.errors import ConfigError, IntegrityError

if TYPE_CHECKING:
    from pipeline_steps.tracking.registry.promotion import PromotionProposal

Actor = Annotated[str | None, typer.Option(help="Name recorded with the decision; default: user@host.")]
Reason = Annotated[str | None, typer.Option(help="Why; is written into the promotion log.")]


@handle_errors
def promote(
    context: typer.Context,
    challenger: Annotated[str, typer.Argument(metavar="[VERSION]", help="Version, alias or run.")] = "challenger",
    auto: Annotated[bool, typer.Option("--auto", help="Let the gate decide; a rejected challenger is not an error.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the result of the gate.")] = False,
    override: Annotated[bool, typer.Option("--override", help="Promote although the gate refuses; needs --reason.")] = False,
    reject: Annotated[bool, typer.Option("--reject", help="Refuse the challenger; needs --reason.")] = False,
    history: Annotated[bool, typer.Option("--history", help="Only list all decisions.")] = False,
    actor: Actor = None,
    reason: Reason = None,
    as_json: JsonFlag = False,
) -> None:
    """Make the challenger champion if it passes the gate (infra/gate.yaml) on the same test items."""
    from pipeline_steps.tracking.registry import promotion

    layout = layout_of(context)
    if sum((auto, dry_run, reject, history, override)) > 1:
        raise ConfigError("--auto, --dry-run, --override, --reject and --history exclude each other", "choose one")
    if (override or reject) and not reason:
        raise ConfigError("--override and --reject need a reason", "add --reason TEXT")
    if history:
        events = promotion.history(layout)
        lines = [event.text() for event in events] or ["no decisions yet"]
        print_result({"decisions": [event.as_dict() for event in events]}, lines, as_json)
        return
    if not dry_run:
        promotion.sync_champion_alias(layout)
    proposal = promotion.propose(layout, challenger)
    shown = _shown(proposal)
    who = actor or f"{getpass.getuser()}@{socket.gethostname()}"
    undecided = _as_dict(proposal)
    if dry_run or (auto and proposal.gate.comparable and not proposal.gate.passed):
        print_result({**undecided, "record": None}, [*shown, "the champion is unchanged"], as_json)
        return
    if not as_json:
        for line in shown:
            print(line)
    if reject:
        promotion.reject(proposal, actor=who, reason=reason or "")
        print_result({**undecided, "record": None}, [f"version {proposal.challenger.version} is rejected"], as_json)
        return
    if not proposal.gate.comparable:
        raise IntegrityError(
            f"version {proposal.challenger.version} is not promoted: {'; '.join(proposal.gate.reasons)}",
            "evaluate both on the same data: sonify compare --evaluate",
        )
    if not (auto or yes or as_json) and (proposal.gate.passed or override):
        typer.confirm(f"make version {proposal.challenger.version} champion?", abort=True)
    why = reason or ("the gate is passed" if auto else "gate passed, confirmed on the command line")
    record = promotion.promote(proposal, actor=who, reason=why, override=override)
    text = (
        f"version {record.version} is champion (entry {record.number} of the promotion log; before: {record.former or 'none'})"
    )
    print_result({**undecided, "record": record.as_dict()}, [text], as_json)


@handle_errors
def rollback(
    context: typer.Context,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    actor: Actor = None,
    reason: Reason = None,
    as_json: JsonFlag = False,
) -> None:
    """Make the newest former champion that is still in MLflow champion again."""
    from pipeline_steps.tracking.registry import promotion

    layout = layout_of(context)
    if not (yes or as_json):
        champion, former = promotion.rollback_target(layout)
        typer.confirm(f"champion {champion} -> {former}?", abort=True)
    who = actor or f"{getpass.getuser()}@{socket.gethostname()}"
    record = promotion.rollback(layout=layout, actor=who, reason=reason or "rolled back on the command line")
    text = f"version {record.version} is champion again (entry {record.number} of the promotion log; before: {record.former})"
    print_result({"record": record.as_dict()}, [text], as_json)


def _shown(proposal: PromotionProposal) -> list[str]:
    champion = proposal.champion
    lines = [
        f"champion    {f'version {champion.version}  {champion.md5}' if champion else 'none'}",
        f"challenger  version {proposal.challenger.version}  {proposal.challenger.md5}",
        f"gate        {'passed' if proposal.gate.passed else 'not passed'}",
    ]
    return [*lines, *(f"  {reason}" for reason in proposal.gate.reasons)]


def _as_dict(proposal: PromotionProposal) -> dict[str, Any]:
    return {
        "champion": proposal.champion.version if proposal.champion else None,
        "challenger": proposal.challenger.version,
        "gate": {
            "passed": proposal.gate.passed,
            "comparable": proposal.gate.comparable,
            "reasons": list(proposal.gate.reasons),
            "metrics": [found.as_dict() for found in proposal.gate.metrics],
        },
        "evaluations": list(proposal.runs),
    }
