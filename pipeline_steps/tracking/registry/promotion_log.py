"""The ledger of promotions: numbered lines that are written once and never change. It is the lock and the audit trail.

MLflow's aliases are last-writer-wins. What MLflow does hold unique, in every database and through its server, is a run's
parameter: (run, key) is a primary key, and a second value for it is refused. So the ledger is one run whose parameters
`0001`, `0002`, ... are the lines, as JSON. Whoever wants to promote writes line N + 1, N being the last line seen when the
decision was made: of two, one is refused. The line is the decision; the alias `champion` only shows what the last line says
and is set again from it by whoever finds it wrong, so a process that dies between the two leaves nothing locked.

There must be one such run: an experiment of a reserved name carries its id, and names of experiments are unique as well.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline_steps.core.errors import DataError, IntegrityError, LockedError, ServiceError
from pipeline_steps.tracking.errors import EntryRejectedError
from pipeline_steps.tracking.registry.model_registry import ModelRegistry

LEDGER_TAG = "sonify.ledger"
RUN_NAME = "promotions"
NOTE = "Names the run that holds the ledger of promotions. Delete neither: without them nobody can say who promoted what."
ATTEMPTS = 5
PAUSE_S = 0.3
MAX_TEXT = 1000


@dataclass(frozen=True, slots=True)
class PromotionEvent:
    """One line of the ledger.

    Attributes:
        number: 1, 2, ...
        kind: `promote`, `rollback` or `reject`.
        version: the version that became champion, or that was rejected.
        former: the champion before; None when there was none.
        actor: who.
        reason: why, in that person's words.
        time: when, ISO 8601 in UTC, by the writer's clock.
        details: md5 of the model, whether the gate passed, its reasons, the runs compared.
        token: random, tells two writers of the same words apart.
    """

    number: int
    kind: str
    version: str
    former: str | None
    actor: str
    reason: str
    time: str
    details: Mapping[str, Any]
    token: str

    def text(self) -> str:
        """One line for people."""
        change = f"version {self.version}" + (f" (before: {self.former})" if self.former and self.kind != "reject" else "")
        return f"{self.number}  {self.time}  {self.kind} {change} by {self.actor}: {self.reason}"


class PromotionLog:
    """The ledger of a store; it is made with its first line."""

    def __init__(self, registry: ModelRegistry) -> None:
        self._registry = registry
        self._name = f"{registry.settings.experiment}-{RUN_NAME}"

    def lines(self) -> list[PromotionEvent]:
        """Every line, in order.

        Raises:
            IntegrityError: the ledger's run was deleted, or a line is missing or is not ours.
        """
        run_id = self.run_id()
        return self._read(run_id) if run_id else []

    def append(
        self,
        seen: int,
        kind: str,
        version: str,
        former: str | None,
        actor: str,
        reason: str,
        details: Mapping[str, Any],
    ) -> PromotionEvent:
        """Write line `seen + 1`.

        Args:
            seen: how many lines there were when the decision was made.

        Raises:
            LockedError: somebody else has written that line.
            ServiceError: the store did not answer; whether the line is there, the next look will tell.
        """
        run_id = self.run_id() or self._make()
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = PromotionEvent(
            seen + 1, kind, version, former, actor[:MAX_TEXT], reason[:MAX_TEXT], now, dict(details), secrets.token_hex(8)
        )
        payload = json.dumps(
            {name: getattr(line, name) for name in line.__slots__ if name != "number"}, ensure_ascii=False, sort_keys=True
        )
        client, key = self._registry.client, f"{line.number:04d}"
        problem: Exception | None = None
        for attempt in range(ATTEMPTS):  # an answer may get lost, a busy SQLite file says so: look, then write again
            lines = self._read(run_id)
            if len(lines) > seen:
                winner = lines[seen]
                if winner.token == line.token:
                    return line
                raise LockedError(
                    f"{winner.actor} was faster: {winner.kind} of version {winner.version} at {winner.time}",
                    "look at the new champion, then decide again",
                    details={"line": winner.number, "version": winner.version},
                )
            if len(lines) < seen:
                raise IntegrityError(f"the ledger of promotions has {len(lines)} lines, {seen} were seen", "look at its run")
            try:
                self._registry.call(lambda: client.log_param(run_id, key, payload))
            except (EntryRejectedError, ServiceError) as error:
                problem = error
                time.sleep(PAUSE_S * attempt)
        if isinstance(problem, ServiceError):
            raise problem
        lines = self._read(run_id)
        if len(lines) > seen and lines[seen].token == line.token:
            return line
        raise IntegrityError(f"line {line.number} of the ledger of promotions was refused: {problem}", "look at its run")

    def run_id(self) -> str | None:
        """Id of the ledger's run; None before the first line."""
        client = self._registry.client
        found = self._registry.call(lambda: client.get_experiment_by_name(self._name))
        return str(found.tags[LEDGER_TAG]) if found is not None else None

    def _make(self) -> str:
        from mlflow.exceptions import MlflowException

        client, experiment = self._registry.client, self._registry.experiment_id()
        tags = {"mlflow.note.content": "Who promoted which model, when and why: one parameter a line, never changed."}
        run = self._registry.call(lambda: client.create_run(experiment, run_name=RUN_NAME, tags=tags))
        own = str(run.info.run_id)
        self._registry.call(lambda: client.set_terminated(own))

        def claim() -> bool:
            try:
                client.create_experiment(self._name, tags={LEDGER_TAG: own, "mlflow.note.content": NOTE})
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                return False
            return True

        if self._registry.call(claim):
            return own
        kept = self.run_id()  # ours, when the first answer got lost
        if kept is None:
            raise IntegrityError(f"experiment {self._name} cannot be read", "restore it in MLflow")
        if kept != own:
            self._registry.call(lambda: client.delete_run(own))
        return kept

    def _read(self, run_id: str) -> list[PromotionEvent]:
        client = self._registry.client
        cure = f"restore run {run_id} in MLflow"
        try:
            run = self._registry.call(lambda: client.get_run(run_id))
        except DataError as error:
            raise IntegrityError("the run that holds the ledger of promotions is gone", cure) from error
        if run.info.lifecycle_stage != "active":
            raise IntegrityError("the run that holds the ledger of promotions was deleted", cure)
        lines = []
        for number, (key, payload) in enumerate(sorted(run.data.params.items()), 1):
            try:
                lines.append(PromotionEvent(number=number, **json.loads(payload)))
            except (ValueError, TypeError) as error:
                raise IntegrityError(f"line {key} of the ledger of promotions is not ours", f"look at run {run_id}") from error
            if key != f"{number:04d}":
                raise IntegrityError(f"line {number:04d} of the ledger of promotions is missing", f"look at run {run_id}")
        return lines
