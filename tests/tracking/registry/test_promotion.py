"""Tests of promotion on a real store: concurrency, audit trail, comparability of evaluations."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from pipeline_steps.core.errors import ConfigError, DataError, IntegrityError, LockedError, ServiceError, StageError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.registry import promotion
from pipeline_steps.tracking.registry.model_registry import ModelRegistry
from pipeline_steps.tracking.registry.promotion import (
    champion_history,
    history,
    promote,
    propose,
    reject,
    rollback,
    rollback_target,
    sync_champion_alias,
)
from pipeline_steps.tracking.registry.promotion_log import PromotionEvent, PromotionLog
from pipeline_steps.tracking.settings import CHAMPION, REGISTERED_MODEL
from tests.factories.registered_models import GATE, PAIRS, client_of, md5_of, register, write_gate
from tests.tracking.helpers import FaultyProxy, Sqlite

WEAK, STRONG = [0.50 + 0.01 * (i % 3) for i in range(12)], [0.60 + 0.01 * (i % 4) for i in range(12)]


@pytest.fixture
def models(layout: ProjectPaths, sqlite: Sqlite) -> ProjectPaths:
    """Version 1 is champion; version 2, the challenger, is better."""
    write_gate(layout)
    register(layout, WEAK, version=1)
    promote(propose(layout), actor="ada", reason="the first")
    register(layout, STRONG, version=2)
    return layout


def champion(layout: ProjectPaths) -> str | None:
    return ModelRegistry(layout).aliases().get(CHAMPION)


def test_first_model_and_then_a_better_one_are_promoted(models: ProjectPaths) -> None:
    assert champion(models) == "1"
    proposal = propose(models)
    assert proposal.champion is not None
    assert (proposal.champion.version, proposal.challenger.version) == ("1", "2")
    assert proposal.challenger.md5 == md5_of(2)
    assert proposal.gate.passed
    (rate,) = [found for found in proposal.gate.metrics if found.metric == "test/win_rate_toy"]
    assert rate.wins == 12
    assert rate.verdict == "better"
    record = promote(proposal, actor="ada", reason="draws better")
    assert (record.version, record.former, record.number) == ("2", "1", 2)
    assert champion(models) == "2"
    assert [(event.kind, event.version, event.actor) for event in history(models)] == [
        ("promote", "1", "ada"),
        ("promote", "2", "ada"),
    ]
    client = client_of(models)
    assert client.get_model_version(REGISTERED_MODEL, "2").tags[promotion.PROMOTED_TAG] == "0002 promote by ada"
    artifacts = client.list_artifacts(proposal.runs[-1], "promotion")
    assert [item.path for item in artifacts] == ["promotion/0002.md"]


def test_proposals_change_nothing(models: ProjectPaths) -> None:
    propose(models)
    assert champion(models) == "1"
    assert len(history(models)) == 1


def test_second_decision_on_the_same_state_is_refused(models: ProjectPaths) -> None:
    first, second = propose(models), propose(models)
    promote(first, actor="ada", reason="mine")
    with pytest.raises(LockedError, match="ada was faster: promote of version 2"):
        promote(second, actor="bob", reason="mine too")
    with pytest.raises(LockedError):
        reject(second, actor="bob", reason="no")
    assert len(history(models)) == 2


def test_concurrent_promotions_write_one_entry(models: ProjectPaths) -> None:
    register(models, [rate + 0.1 for rate in STRONG], version=3)
    proposals = [propose(models, "2"), propose(models, "3")]
    barrier, outcomes = threading.Barrier(2), []

    def run(number: int) -> None:
        barrier.wait()
        try:
            outcomes.append(promote(proposals[number], actor=f"p{number}", reason="race").version)
        except StageError as error:
            outcomes.append(type(error).__name__)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("LockedError") == 1
    assert len(history(models)) == 2
    assert champion(models) == history(models)[-1].version


def test_gate_refuses_and_can_be_overridden(models: ProjectPaths) -> None:
    promote(propose(models), actor="ada", reason="better")
    register(models, WEAK, version=3)
    proposal = propose(models)
    assert not proposal.gate.passed
    with pytest.raises(DataError, match="version 3 is not promoted: NO: test/win_rate_toy"):
        promote(proposal, actor="bob", reason="I like it")
    promote(proposal, actor="bob", reason="I like it", override=True)
    assert history(models)[-1].details["gate_passed"] is False


@pytest.mark.parametrize("changed", [{"pairs": f"{2:032x}.dir"}, {"protocol": {"seed": 1}}])
def test_evaluations_on_different_data_are_not_compared(models: ProjectPaths, changed: dict[str, Any]) -> None:
    register(models, STRONG, version=3, **changed)
    proposal = propose(models)
    assert not proposal.gate.passed
    assert not proposal.gate.comparable
    if "pairs" in changed:
        assert PAIRS in proposal.gate.reasons[0]
        assert changed["pairs"] in proposal.gate.reasons[0]
    with pytest.raises(IntegrityError, match="not evaluated on the same data"):
        promote(proposal, actor="ada", reason="anyway", override=True)
    assert champion(models) == "1"


def test_older_comparable_evaluation_is_found(models: ProjectPaths) -> None:
    """Version 1 was evaluated again on newer data; the comparable pair of evaluations is used."""
    client = client_of(models)
    experiment = client.get_experiment_by_name("seeing-sound").experiment_id
    newer = client.create_run(experiment, run_name="evaluate")
    from tests.factories.registered_models import report

    client.log_inputs(
        newer.info.run_id, ModelRegistry(models).evaluations(ModelRegistry(models).version("1"))[0].inputs.dataset_inputs
    )
    client.log_text(newer.info.run_id, __import__("json").dumps(report(WEAK, 0.1, {"seed": 9})), "report/evaluation.json")
    client.set_terminated(newer.info.run_id)
    assert propose(models).gate.passed


def test_rollback_restores_the_former_champion_and_closes_the_gate(models: ProjectPaths) -> None:
    promote(propose(models), actor="ada", reason="better")
    record = rollback(layout=models, actor="eve", reason="cannot draw cats")
    assert (record.kind, record.version, record.former) == ("rollback", "1", "2")
    assert champion(models) == "1"
    again = propose(models)
    assert not again.gate.passed
    assert "rollback by eve: cannot draw cats" in again.gate.reasons[-1]
    with pytest.raises(DataError, match="no former champion"):
        rollback(layout=models, actor="eve", reason="further")


def test_rejected_challenger_does_not_pass_the_gate_again(models: ProjectPaths) -> None:
    reject(propose(models), actor="eve", reason="too dark")
    assert champion(models) == "1"
    assert "reject by eve: too dark" in propose(models).gate.reasons[-1]
    assert not propose(models).gate.passed


def test_interrupted_promotion_is_completed_later(models: ProjectPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    proposal = propose(models)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(promotion, "_set_alias", interrupt)
        with pytest.raises(KeyboardInterrupt):
            promote(proposal, actor="ada", reason="killed here")
    assert champion(models) == "1"
    proposal = propose(models)
    assert proposal.champion is not None
    assert proposal.champion.version == "2"
    assert sync_champion_alias(models) == "2"
    assert champion(models) == "2"


def test_slow_alias_update_corrects_itself(models: ProjectPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another decision is made between reading the log and setting the alias; the alias must follow the log."""
    register(models, [rate + 0.1 for rate in STRONG], version=3)
    real, calls = promotion._set_alias, []

    def slow(registry: ModelRegistry, version: str, note: str) -> None:
        calls.append(version)
        if len(calls) == 1:
            promote(propose(models, "3"), actor="bob", reason="in between")
        real(registry, version, note)

    monkeypatch.setattr(promotion, "_set_alias", slow)
    promote(propose(models, "2"), actor="ada", reason="slow")
    assert calls == ["2", "3", "3"]
    assert champion(models) == "3"


def test_alias_moved_by_hand_is_ignored(models: ProjectPaths) -> None:
    client_of(models).set_registered_model_alias(REGISTERED_MODEL, CHAMPION, "2")
    proposal = propose(models)
    assert proposal.champion is not None
    assert proposal.champion.version == "1"
    assert sync_champion_alias(models) == "1"


def test_champion_alias_without_a_log_counts(layout: ProjectPaths, sqlite: Sqlite) -> None:
    write_gate(layout)
    register(layout, WEAK, version=1)
    client_of(layout).set_registered_model_alias(REGISTERED_MODEL, CHAMPION, "1")
    register(layout, STRONG, version=2)
    proposal = propose(layout)
    assert proposal.champion is not None
    assert proposal.champion.version == "1"
    promote(proposal, actor="ada", reason="better")
    assert rollback(layout=layout, actor="ada", reason="back").version == "1"


def test_champion_deleted_in_mlflow_does_not_block(models: ProjectPaths) -> None:
    register(models, [rate + 0.1 for rate in STRONG], version=3)
    promote(propose(models, "2"), actor="ada", reason="better")
    promote(propose(models, "3"), actor="ada", reason="better still")
    client = client_of(models)
    for version in ("2", "3"):
        client.delete_model_version(REGISTERED_MODEL, version)
    assert sync_champion_alias(models) is None
    register(models, STRONG, version=4)
    proposal = propose(models)
    assert proposal.champion is None
    assert proposal.gate.reasons[0] == "yes: there is no champion: version 3 was deleted in MLflow"
    assert rollback_target(models) == ("3", "1")
    record = rollback(layout=models, actor="eve", reason="deleted by mistake")
    assert (record.version, record.former) == ("1", "3")
    assert champion(models) == "1"
    with pytest.raises(LockedError):
        promote(proposal, actor="ada", reason="on an old view")
    promote(propose(models), actor="ada", reason="better")
    client.delete_model_version(REGISTERED_MODEL, "1")
    with pytest.raises(DataError, match="no former champion"):
        rollback(layout=models, actor="eve", reason="further")


def test_log_entries_cannot_be_changed(models: ProjectPaths) -> None:
    from mlflow.exceptions import MlflowException

    run_id = PromotionLog(ModelRegistry(models)).run_id()
    assert run_id is not None
    with pytest.raises(MlflowException, match="Changing param values is not allowed"):
        client_of(models).log_param(run_id, "0001", "{}")
    client_of(models).delete_run(run_id)
    with pytest.raises(IntegrityError, match="was deleted"):
        propose(models)
    client_of(models).restore_run(run_id)
    assert len(history(models)) == 1


def test_secrets_are_redacted_in_the_log(models: ProjectPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEAM_API_KEY", "sk-123456789")
    promote(propose(models), actor="ada", reason="asked https://ada:pw@host/x with sk-123456789")
    (entry,) = history(models)[1:]
    assert entry.reason == "asked https://***@host/x with ***"


@pytest.mark.parametrize("who", [{"actor": " ", "reason": "x"}, {"actor": "ada", "reason": ""}])
def test_actor_and_reason_are_required(models: ProjectPaths, who: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="a decision needs"):
        promote(propose(models), **who)


def test_missing_challenger_and_evaluation_are_named(layout: ProjectPaths, sqlite: Sqlite) -> None:
    write_gate(layout)
    with pytest.raises(DataError, match="is no version"):
        propose(layout)
    register(layout, WEAK, version=1)
    promote(propose(layout), actor="ada", reason="first")
    with pytest.raises(ConfigError, match="champion already"):
        promote(propose(layout), actor="ada", reason="again")
    client = client_of(layout)
    client.create_model_version(REGISTERED_MODEL, source="file:///x", tags={"dvc.md5": md5_of(2)})
    with pytest.raises(DataError, match="version 2 has no evaluation"):
        propose(layout, "2")


def test_without_a_store_nothing_is_created(layout: ProjectPaths) -> None:
    write_gate(layout)
    with pytest.raises(ConfigError, match="nothing was tracked here"):
        propose(layout)
    assert not (layout.root / "mlflow.db").exists()


def event(number: int, kind: str, version: str, former: str | None) -> PromotionEvent:
    return PromotionEvent(number, kind, version, former, "a", "r", "t", {}, "x")


def test_champion_history_follows_the_log() -> None:
    events = [
        event(1, "promote", "2", "1"),
        event(2, "reject", "3", "2"),
        event(3, "promote", "4", "2"),
        event(4, "rollback", "2", "4"),
        event(5, "promote", "5", "2"),
    ]
    assert champion_history(events) == ["1", "2", "5"]
    assert champion_history([*events, event(6, "rollback", "1", "5")]) == ["1"], "2 was deleted in MLflow"
    assert champion_history([]) == []


@pytest.mark.parametrize("kind", ["refuse", "lose"])
def test_decisions_through_a_failing_server(
    layout: ProjectPaths, server: FaultyProxy, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost response neither duplicates an entry nor turns a written entry into an error."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", f"seeing-sound-{kind}")
    client = client_of(layout)
    for found in client.search_registered_models():
        client.delete_registered_model(found.name)
    write_gate(layout)
    register(layout, WEAK, version=1)
    server.inject(kind, times=1, path="log-parameter")
    record = promote(propose(layout), actor="ada", reason="first")
    assert record.version == "1"
    assert len(history(layout)) == 1
    register(layout, STRONG, version=2)
    proposal = propose(layout)
    server.inject(kind, path="registered-models/alias")
    with pytest.raises(ServiceError, match="entry 2 is written"):
        promote(proposal, actor="ada", reason="second")
    server.inject("", times=0)
    assert len(history(layout)) == 2
    assert sync_champion_alias(layout) == "2"


@pytest.mark.parametrize("second", [False, True])
def test_model_at_chance_never_becomes_champion(layout: ProjectPaths, sqlite: Sqlite, second: bool) -> None:
    write_gate(layout)
    if second:
        register(layout, [0.3, 0.4] * 6, version=1)
        client_of(layout).set_registered_model_alias(REGISTERED_MODEL, CHAMPION, "1")  # by hand: the gate would refuse it
    register(layout, [0.496, 0.508] * 6, version=2 if second else 1)  # interval 0.497 to 0.507
    before = champion(layout)
    proposal = propose(layout)
    assert not proposal.gate.passed
    assert proposal.gate.at_chance
    assert any("its interval must lie above chance (0.5)" in reason for reason in proposal.gate.reasons)
    for override in (False, True):
        with pytest.raises(DataError, match="above chance"):
            promote(proposal, actor="ada", reason="I like it", override=override)
    assert champion(layout) == before
    assert history(layout) == []


def test_win_rate_that_was_not_measured_is_no_promotion_but_can_be_overridden(layout: ProjectPaths, sqlite: Sqlite) -> None:
    write_gate(layout, GATE + "  above_chance: [gold/win_rate_toy]\n")
    register(layout, STRONG, version=1)
    proposal = propose(layout)
    assert not proposal.gate.passed
    assert not proposal.gate.at_chance
    assert promote(proposal, actor="ada", reason="no gold pairs", override=True).version == "1"


def test_missing_alias_is_a_usage_error_that_says_what_to_do(layout: ProjectPaths, sqlite: Sqlite) -> None:
    register(layout, STRONG, version=1)
    with pytest.raises(ConfigError, match=r"there is no champion yet.*sonify promote, or name a version: 1") as caught:
        ModelRegistry(layout).resolve("champion")
    assert caught.value.exit_code == 2
