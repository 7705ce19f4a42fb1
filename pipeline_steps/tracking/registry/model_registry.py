"""Model registry: versions of the registered model and their evaluations. Used by commands and flows, not by stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline_steps.core.errors import ConfigError, DataError, ServiceError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.client.mlflow_client import MlflowStore, Parameters, Result, run_datasets
from pipeline_steps.tracking.client.uploader import check_reachable
from pipeline_steps.tracking.errors import EntryRejectedError, StoreUnavailableError
from pipeline_steps.tracking.lineage.dvc_digests import relative
from pipeline_steps.tracking.settings import CHALLENGER, CHAMPION, REGISTERED_MODEL, SYNC_TIMEOUT_S, read_settings, redact

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion


@dataclass(frozen=True, slots=True)
class ModelVersionInfo:
    """One version of the registered model."""

    version: str  # version number
    md5: str  # DVC's md5 of the exported folder
    url: str | None  # page in MLflow; None if the store is a database without a server
    run_id: str = ""  # training run
    model_id: str = ""  # MLflow's logged model
    commit: str = ""  # git commit at training; empty if unknown
    aliases: tuple[str, ...] = ()  # aliases of the version
    tags: Mapping[str, str] = field(default_factory=dict)  # all tags of the version


class ModelRegistry(MlflowStore):
    """Access to the project's MLflow store that raises the project's errors.

    Raises:
        ConfigError: the default database does not exist.
        ServiceError: the server does not answer.
    """

    def __init__(self, layout: ProjectPaths) -> None:
        self.layout = layout
        settings = read_settings(layout)
        if settings.is_missing:
            raise ConfigError(f"{redact(settings.uri)} does not exist: nothing was tracked here", "run: dvc repro")
        try:
            check_reachable(settings)
        except StoreUnavailableError as error:
            raise ServiceError(redact(str(error)), "check MLFLOW_TRACKING_URI and the server", transient=True) from error
        super().__init__(settings, SYNC_TIMEOUT_S)

    def call(self, function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        """Call a method of the client and map its errors.

        Raises:
            ServiceError: the store is unavailable (transient).
            DataError: the requested object does not exist.
            EntryRejectedError: the store refused the request.
        """
        try:
            return super().call(function, *args, **kwargs)
        except StoreUnavailableError as error:
            if getattr(error.__cause__, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
                raise DataError(f"MLflow: {redact(str(error.__cause__))[:300]}") from error
            reason = f"MLflow at {redact(self.settings.uri)}: {redact(str(error))[:300]}"
            raise ServiceError(reason, "try again when MLflow answers", transient=True) from error

    def aliases(self) -> dict[str, str]:
        """Alias -> number of its version."""
        try:
            model = self.call(self.client.get_registered_model, REGISTERED_MODEL)
        except DataError:  # no model was registered yet
            return {}
        return {alias: str(version) for alias, version in model.aliases.items()}

    def run(self, run_id: str) -> Run | None:
        """A run; None if the id is empty or the run was deleted."""
        try:
            return self.call(self.client.get_run, run_id) if run_id else None
        except (EntryRejectedError, DataError):
            return None

    def versions(self) -> list[ModelVersionInfo]:
        """All versions, oldest first."""
        found = self.call(self.client.search_model_versions, f"name = '{REGISTERED_MODEL}'", max_results=10_000)
        aliases = self.aliases()
        infos = [self._info(version, aliases) for version in found]
        return sorted(infos, key=lambda info: int(info.version))

    def version(self, number: str) -> ModelVersionInfo:
        """Version by number.

        Raises:
            DataError: the version does not exist.
        """
        try:
            found = self.call(self.client.get_model_version, REGISTERED_MODEL, number)
        except (EntryRejectedError, DataError) as error:
            raise DataError(f"{REGISTERED_MODEL} has no version {number}", "list the versions: sonify trace --list") from error
        return self._info(found, self.aliases())

    def all_tags(self, info: ModelVersionInfo) -> dict[str, str]:
        """Tags of a version and of its logged model, which has those on data and code."""
        try:
            model = self.call(self.client.get_logged_model, info.model_id) if info.model_id.startswith("m-") else None
        except (EntryRejectedError, DataError):  # deleted
            model = None
        return {**(model.tags if model else {}), **info.tags}

    def resolve(self, name: str) -> ModelVersionInfo:
        """Version by number, alias (with or without @), MLflow run id or DVC md5.

        A prefix of 6 or more characters of a run id or an md5 is enough.

        Raises:
            ConfigError: no version has the alias `champion` or `challenger` yet.
            DataError: no version or several versions match.
        """
        text = name.strip().removeprefix(f"models:/{REGISTERED_MODEL}").lstrip("@/")
        versions = self.versions()
        for info in versions:
            if text == info.version or text in info.aliases:
                return info
        evaluated = run_datasets(self.run(text) if len(text) == 32 else None).get(relative(self.layout, self.layout.model))
        matches = [
            info
            for info in versions
            if len(text) >= 6 and (info.run_id.startswith(text) or info.md5.startswith(text) or evaluated == info.md5)
        ]
        if len({info.md5 for info in matches}) == 1:
            return matches[-1]
        if text in {CHAMPION, CHALLENGER} and versions:
            known = ", ".join(info.version for info in versions[-8:])
            raise ConfigError(f"there is no {text} yet", f"make one with sonify promote, or name a version: {known}")
        names = ", ".join([*(info.version for info in versions[-8:]), *sorted({a for i in versions for a in i.aliases})])
        problem = "is ambiguous" if matches else "is no version, alias or run"
        raise DataError(f"{name!r} {problem} of {REGISTERED_MODEL}", f"use one of: {names}" if names else "run: dvc repro")

    def evaluations(self, info: ModelVersionInfo) -> list[Run]:
        """Finished runs of stage `evaluate` on a model with the version's bytes, newest first."""
        query = f"dataset.digest = '{info.md5}' and attributes.status = 'FINISHED' and attributes.run_name = 'evaluate'"
        order = ["attributes.start_time DESC"]
        return list(self.call(self.client.search_runs, [self.experiment_id()], query, order_by=order, max_results=100))

    def _info(self, version: ModelVersion, aliases: Mapping[str, str]) -> ModelVersionInfo:
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
            aliases=tuple(sorted(alias for alias, holder in aliases.items() if holder == number)),
            tags=tags,
        )
