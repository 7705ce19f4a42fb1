"""Model registry: versions of the registered model and their evaluations. Used by commands and flows, not by stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline_steps.core.errors import ConfigError, DataError, ServiceError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.client.mlflow_client import MlflowStore, run_datasets
from pipeline_steps.tracking.client.uploader import check_reachable
from pipeline_steps.tracking.errors import EntryRejectedError, StoreUnavailableError
from pipeline_steps.tracking.settings import REGISTERED_MODEL, SYNC_TIMEOUT_S, read_settings, redact

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ModelVersionInfo:
    """One version of the registered model.

    Attributes:
        version: version number.
        md5: DVC's md5 of the exported folder.
        url: page in MLflow; None if the store is a database without a server.
        run_id: training run.
        model_id: MLflow's logged model.
        commit: git commit at training; empty if unknown.
        created: milliseconds since 1970.
        aliases: aliases of the version.
        tags: all tags of the version.
    """

    version: str
    md5: str
    url: str | None
    run_id: str = ""
    model_id: str = ""
    commit: str = ""
    created: int = 0
    aliases: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)


class ModelRegistry:
    """Access to the project's MLflow store that raises the project's errors.

    Raises:
        ConfigError: the default database does not exist.
        ServiceError: the server does not answer.
    """

    def __init__(self, layout: ProjectPaths) -> None:
        self.layout = layout
        self.settings = read_settings(layout)
        database = self.settings.uri.removeprefix("sqlite:///")
        if database != self.settings.uri and not Path(database).is_file():  # MLflow would create an empty database
            raise ConfigError(f"{redact(self.settings.uri)} does not exist: nothing was tracked here", "run: dvc repro")
        try:
            check_reachable(self.settings)
            self._store = MlflowStore(self.settings, SYNC_TIMEOUT_S)
        except StoreUnavailableError as error:
            raise ServiceError(redact(str(error)), "check MLFLOW_TRACKING_URI and the server", transient=True) from error
        self.client: MlflowClient = self._store.client

    def call(self, function: Callable[[], Result]) -> Result:
        """Call `function` and map its errors.

        Raises:
            ServiceError: the store is unavailable (transient).
            DataError: the requested object does not exist.
            EntryRejectedError: the store refused the request.
        """
        try:
            return self._store.call(function)
        except StoreUnavailableError as error:
            if getattr(error.__cause__, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
                raise DataError(f"MLflow: {redact(str(error.__cause__))[:300]}") from error
            raise _unavailable(self.settings.uri, error) from error

    def experiment_id(self) -> str:
        """Id of the project's experiment, which is created if it does not exist."""
        try:
            return self._store.experiment_id()
        except StoreUnavailableError as error:
            raise _unavailable(self.settings.uri, error) from error

    def alias(self, name: str) -> str | None:
        """Number of the version with an alias; None if the alias is not set."""
        model = self._registered()
        found = model.aliases.get(name) if model else None
        return None if found is None else str(found)

    def versions(self) -> list[ModelVersionInfo]:
        """All versions, oldest first."""
        found = self.call(lambda: self.client.search_model_versions(f"name = '{REGISTERED_MODEL}'", max_results=10_000))
        aliases = self._aliases()
        infos = [self._info(version, aliases) for version in found]
        return sorted(infos, key=lambda info: int(info.version))

    def version(self, number: str) -> ModelVersionInfo:
        """Version by number.

        Raises:
            DataError: the version does not exist.
        """
        try:
            found = self.call(lambda: self.client.get_model_version(REGISTERED_MODEL, number))
        except (EntryRejectedError, DataError) as error:
            raise DataError(f"{REGISTERED_MODEL} has no version {number}", "list the versions: sonify trace --list") from error
        return self._info(found, self._aliases())

    def resolve(self, name: str) -> ModelVersionInfo:
        """Version by number, alias (with or without @), MLflow run id or DVC md5.

        A prefix of 6 or more characters of a run id or an md5 is enough.

        Raises:
            DataError: no version or several versions match.
        """
        text = name.strip().removeprefix(f"models:/{REGISTERED_MODEL}").lstrip("@/")
        versions = self.versions()
        for info in versions:
            if text == info.version or text in info.aliases:
                return info
        evaluated = self._evaluated_model(text)
        matches = [
            info
            for info in versions
            if len(text) >= 6 and (info.run_id.startswith(text) or info.md5.startswith(text) or evaluated == info.md5)
        ]
        if len({info.md5 for info in matches}) == 1:
            return matches[-1]
        names = ", ".join([*(info.version for info in versions[-8:]), *sorted({a for i in versions for a in i.aliases})])
        problem = "is ambiguous" if matches else "is no version, alias or run"
        raise DataError(f"{name!r} {problem} of {REGISTERED_MODEL}", f"use one of: {names}" if names else "run: dvc repro")

    def evaluations(self, info: ModelVersionInfo) -> list[Run]:
        """Finished runs of stage `evaluate` on a model with the version's bytes, newest first."""
        query = f"dataset.digest = '{info.md5}' and attributes.status = 'FINISHED' and attributes.run_name = 'evaluate'"
        experiment = self.experiment_id()
        return list(
            self.call(
                lambda: self.client.search_runs([experiment], query, order_by=["attributes.start_time DESC"], max_results=100)
            )
        )

    def _evaluated_model(self, run_id: str) -> str:
        """md5 of the model of an evaluation run; empty if there is no such run."""
        if len(run_id) != 32:
            return ""
        try:
            run = self.call(lambda: self.client.get_run(run_id))
        except (EntryRejectedError, DataError):
            return ""
        path = self.layout.model.relative_to(self.layout.root).as_posix()
        return run_datasets(run).get(path, "")

    def _registered(self) -> Any:
        from mlflow.exceptions import MlflowException

        def find() -> Any:
            try:
                return self.client.get_registered_model(REGISTERED_MODEL)
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return None
                raise

        return self.call(find)

    def _aliases(self) -> dict[str, list[str]]:
        model = self._registered()
        names: dict[str, list[str]] = {}
        for alias, version in (model.aliases if model else {}).items():
            names.setdefault(str(version), []).append(alias)
        return names

    def _info(self, version: ModelVersion, aliases: Mapping[str, list[str]]) -> ModelVersionInfo:
        number = str(version.version)
        uri = redact(self.settings.uri).replace("***@", "").rstrip("/")
        page = f"{uri}/#/models/{REGISTERED_MODEL}/versions/{number}" if self.settings.is_server else None
        tags = dict(version.tags)
        return ModelVersionInfo(
            version=number,
            md5=tags.get("dvc.md5", ""),
            url=page,
            run_id=version.run_id or "",
            model_id=str(version.source).removeprefix("models:/"),
            commit=tags.get("git.commit", ""),
            created=int(version.creation_timestamp),
            aliases=tuple(sorted(aliases.get(number, ()))),
            tags=tags,
        )


def _unavailable(uri: str, error: StoreUnavailableError) -> ServiceError:
    return ServiceError(f"MLflow at {redact(uri)}: {redact(str(error))[:300]}", "try again when MLflow answers", transient=True)
