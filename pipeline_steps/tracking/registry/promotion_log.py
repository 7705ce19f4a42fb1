"""Promotion log: append-only, numbered entries in MLflow. It is the lock and the audit trail of promotions.

MLflow's aliases are last-writer-wins. A run's parameter is unique in every database and through the server: (run, key) is a
primary key, and a second value is refused. The log is therefore one run whose parameters `0001`, `0002`, ... are the entries,
as JSON. A decision made when the log had N entries is written as entry N + 1; of two concurrent decisions one is refused. The
entry is the decision. The alias `champion` follows the last entry and is reset from the log when it differs, so a process that
dies between the two writes leaves no lock.

An experiment with a reserved name holds the id of this run. Names of experiments are unique, so there is one such run.
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

LOG_RUN_TAG = "sonify.ledger"
RUN_NAME = "promotions"
NOTE = "Holds the id of the run with the promotion log. Do not delete the experiment or the run: they are the audit trail."
MAX_ATTEMPTS = 5
PAUSE_S = 0.3
MAX_TEXT = 1000


@dataclass(frozen=True, slots=True)
class PromotionEvent:
    """One entry of the promotion log. The names of the fields are the keys of the stored JSON.

    Attributes:
        number: 1, 2, ...
        kind: `promote`, `rollback` or `reject`.
        version: version that became champion or was rejected.
        former: champion before the event; None if there was none.
        actor: user or flow that decided.
        reason: reason given by the actor.
        time: ISO 8601 in UTC, by the writer's clock.
        details: md5 of the model, whether the gate passed, its reasons, the compared evaluation runs.
        token: random value that identifies the writer.
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

    def as_dict(self) -> dict[str, Any]:
        """Fields for JSON, without the token."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "token"}

    def text(self) -> str:
        """One line for a terminal."""
        change = f"version {self.version}" + (f" (before: {self.former})" if self.former and self.kind != "reject" else "")
        return f"{self.number}  {self.time}  {self.kind} {change} by {self.actor}: {self.reason}"


class PromotionLog:
    """Promotion log of a store; it is created with its first entry."""

    def __init__(self, registry: ModelRegistry) -> None:
        self._registry = registry
        self._name = f"{registry.settings.experiment}-{RUN_NAME}"

    def events(self) -> list[PromotionEvent]:
        """All entries, oldest first.

        Raises:
            IntegrityError: the run of the log was deleted, or an entry is missing or not valid.
        """
        run_id = self.run_id()
        return self._read(run_id) if run_id else []

    def append(
        self,
        num_events: int,
        kind: str,
        version: str,
        former: str | None,
        actor: str,
        reason: str,
        details: Mapping[str, Any],
    ) -> PromotionEvent:
        """Write entry `num_events + 1`.

        Args:
            num_events: number of entries at the time of the decision.
            kind, version, former, actor, reason, details: see `PromotionEvent`.

        Raises:
            LockedError: another process has written this entry.
            ServiceError: the store did not answer; the entry may have been written.
            IntegrityError: entries are missing, or the store refused the entry.
        """
        run_id = self.run_id() or self._create()
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        event = PromotionEvent(
            num_events + 1, kind, version, former, actor[:MAX_TEXT], reason[:MAX_TEXT], now, dict(details), secrets.token_hex(8)
        )
        fields = {**event.as_dict(), "token": event.token}
        del fields["number"]
        payload = json.dumps(fields, ensure_ascii=False, sort_keys=True)
        client, key = self._registry.client, f"{event.number:04d}"
        problem: Exception | None = None
        for attempt in range(MAX_ATTEMPTS + 1):  # a response may be lost or SQLite be busy: read before each write
            events = self._read(run_id)
            if len(events) > num_events:
                winner = events[num_events]
                if winner.token == event.token:
                    return event
                raise LockedError(
                    f"{winner.actor} was faster: {winner.kind} of version {winner.version} at {winner.time}",
                    "check the new champion and decide again",
                    details={"entry": winner.number, "version": winner.version},
                )
            if len(events) < num_events:
                raise IntegrityError(
                    f"the promotion log has {len(events)} entries, {num_events} were expected", f"check run {run_id} in MLflow"
                )
            if attempt == MAX_ATTEMPTS:
                break
            try:
                self._registry.call(client.log_param, run_id, key, payload)
            except (EntryRejectedError, ServiceError) as error:
                problem = error
                time.sleep(PAUSE_S * attempt)
        if isinstance(problem, ServiceError):
            raise problem
        raise IntegrityError(
            f"entry {event.number} of the promotion log was refused: {problem}", f"check run {run_id} in MLflow"
        )

    def run_id(self) -> str | None:
        """Id of the run that holds the log; None before the first entry."""
        found = self._registry.call(self._registry.client.get_experiment_by_name, self._name)
        return str(found.tags[LOG_RUN_TAG]) if found is not None else None

    def _create(self) -> str:
        """Create the run of the log, or return the run that another process created first."""
        client, experiment = self._registry.client, self._registry.experiment_id()
        tags = {"mlflow.note.content": "Promotion log: who promoted which model, when and why. One parameter per entry."}
        run = self._registry.call(client.create_run, experiment, run_name=RUN_NAME, tags=tags)
        own = str(run.info.run_id)
        self._registry.call(client.set_terminated, own)
        try:
            self._registry.call(client.create_experiment, self._name, tags={LOG_RUN_TAG: own, "mlflow.note.content": NOTE})
            return own
        except EntryRejectedError as error:  # the experiment exists
            stored = self.run_id()  # equal to `own` if a response was lost
            if stored is None:
                raise IntegrityError(f"experiment {self._name} cannot be read", "restore it in MLflow") from error
        if stored != own:
            self._registry.call(client.delete_run, own)
        return stored

    def _read(self, run_id: str) -> list[PromotionEvent]:
        action = f"restore run {run_id} in MLflow"
        try:
            run = self._registry.call(self._registry.client.get_run, run_id)
        except DataError as error:
            raise IntegrityError("the run of the promotion log does not exist", action) from error
        if run.info.lifecycle_stage != "active":
            raise IntegrityError("the run of the promotion log was deleted", action)
        events = []
        for number, (key, payload) in enumerate(sorted(run.data.params.items()), 1):
            try:
                events.append(PromotionEvent(number=number, **json.loads(payload)))
            except (ValueError, TypeError) as error:
                raise IntegrityError(
                    f"entry {key} of the promotion log is not valid", f"check run {run_id} in MLflow"
                ) from error
            if key != f"{number:04d}":
                raise IntegrityError(f"entry {number:04d} of the promotion log is missing", f"check run {run_id} in MLflow")
        return events
