"""Model versions and their evaluations, read from MLflow by whoever asks: a command or a flow, never a stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from pipeline_steps.core.errors import ConfigError, DataError, ServiceError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.client.uploader import check_reachable
from pipeline_steps.tracking.errors import EntryRejectedError, StoreUnavailableError
from pipeline_steps.tracking.settings import REGISTERED_MODEL, SYNC_TIMEOUT_S, read_settings, redact

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

Result = TypeVar("Result")

CHAMPION = "champion"
CHALLENGER = "challenger"


def run_datasets(run: Run) -> dict[str, str]:
    """Name -> digest of the data sets that a run read."""
    return {found.dataset.name: found.dataset.digest for found in (run.inputs.dataset_inputs if run.inputs else ())}


@dataclass(frozen=True, slots=True)
class ModelVersionInfo:
    """One version of the registered model.

    Attributes:
        version: its number.
        md5: DVC's md5 of the exported folder.
        url: its page in MLflow; None when the store is a database without a server.
        run_id: the training run.
        model_id: MLflow's logged model.
        commit: git commit it was trained at; empty when unknown.
        created: milliseconds since 1970.
        aliases: names that point at it.
        tags: everything else that is known about it.
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
    """The project's MLflow store, with its failures as the project's errors.

    Raises:
        ConfigError: nothing was ever tracked here.
        ServiceError: the server does not answer.
    """

    def __init__(self, layout: ProjectPaths) -> None:
        self.layout = layout
        self.settings = read_settings(layout)
        parts = urlsplit(self.settings.uri)
        if parts.scheme == "sqlite":
            from pathlib import Path

            # MLflow would make an empty database, and take its time over it.
            if not Path(self.settings.uri.removeprefix("sqlite:///")).is_file():
                raise ConfigError(f"{redact(self.settings.uri)} does not exist: nothing was tracked here", "run: dvc repro")
        try:
            check_reachable(self.settings)
            from pipeline_steps.tracking.client.mlflow_client import MlflowStore

            self._store = MlflowStore(self.settings, SYNC_TIMEOUT_S)
        except StoreUnavailableError as error:
            raise ServiceError(redact(str(error)), "check MLFLOW_TRACKING_URI and the server", transient=True) from error
        self.client: MlflowClient = self._store.client

    def call(self, function: Callable[[], Result]) -> Result:
        """Run `function` on the client.

        Raises:
            ServiceError: the store did not answer (transient).
            DataError: it does not hold what was asked for.
            RejectedError: it answered no.
        """
        try:
            return self._store.call(function)
        except StoreUnavailableError as error:
            if getattr(error.__cause__, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
                raise DataError(f"MLflow: {redact(str(error.__cause__))[:300]}") from error
            where = redact(self.settings.uri)
            raise ServiceError(
                f"MLflow at {where}: {redact(str(error))[:300]}", "try again when it answers", transient=True
            ) from error

    def experiment_id(self) -> str:
        """Id of the project's experiment, made when it is missing."""
        try:
            return self._store.experiment_id()
        except StoreUnavailableError as error:
            raise ServiceError(redact(str(error)), "try again when MLflow answers", transient=True) from error

    def alias(self, name: str) -> str | None:
        """Number of the version an alias points at."""
        model = self._registered()
        found = model.aliases.get(name) if model else None
        return None if found is None else str(found)

    def versions(self) -> list[ModelVersionInfo]:
        """Every version, oldest first."""
        found = self.call(lambda: self.client.search_model_versions(f"name = '{REGISTERED_MODEL}'", max_results=10_000))
        aliases = self._aliases()
        infos = [self._info(version, aliases) for version in found]
        return sorted(infos, key=lambda info: int(info.version))

    def version(self, number: str) -> ModelVersionInfo:
        """One version by its number.

        Raises:
            DataError: the registry does not hold it.
        """
        try:
            found = self.call(lambda: self.client.get_model_version(REGISTERED_MODEL, number))
        except (EntryRejectedError, DataError) as error:
            raise DataError(f"{REGISTERED_MODEL} has no version {number}", "sonify trace --list shows what there is") from error
        return self._info(found, self._aliases())

    def resolve(self, name: str) -> ModelVersionInfo:
        """A version by number, alias (with or without @), MLflow run id or DVC md5 (also their beginning, 6 characters up).

        Raises:
            DataError: nothing, or more than one thing, is called so.
        """
        text = name.strip().removeprefix(f"models:/{REGISTERED_MODEL}").lstrip("@/")
        versions = self.versions()
        for info in versions:
            if text == info.version or text in info.aliases:
                return info
        judged = self._evaluated_by(text)
        matches = [
            info
            for info in versions
            if len(text) >= 6 and (info.run_id.startswith(text) or info.md5.startswith(text) or judged == info.md5)
        ]
        if len({info.md5 for info in matches}) == 1:
            return matches[-1]
        known = ", ".join([*(info.version for info in versions[-8:]), *sorted({a for i in versions for a in i.aliases})])
        what = "is ambiguous" if matches else "is no version, alias or run"
        raise DataError(f"{name!r} {what} of {REGISTERED_MODEL}", f"known: {known or 'none; run dvc repro'}")

    def evaluations(self, info: ModelVersionInfo) -> list[Run]:
        """Finished runs of `evaluate` on a model with these bytes, newest first."""
        query = f"dataset.digest = '{info.md5}' and attributes.status = 'FINISHED' and attributes.run_name = 'evaluate'"
        experiment = self.experiment_id()
        return list(
            self.call(
                lambda: self.client.search_runs([experiment], query, order_by=["attributes.start_time DESC"], max_results=100)
            )
        )

    def _evaluated_by(self, run_id: str) -> str:
        """md5 of the model that an evaluation run judged; empty when there is no such run."""
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
