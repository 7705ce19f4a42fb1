"""Lightning logger that writes to the tracking queue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import Logger

from pipeline_steps.core.array_types import ByteArray
from pipeline_steps.tracking import NoOpTracker


class TrackingLogger(Logger):  # type: ignore[misc, unused-ignore]
    """Passes what the module logs to a tracker, which does nothing in all processes but the first.

    Lightning counts steps from 0; here step k is the state after k optimizer steps. The name of a loss contains the objective:
    losses of two objectives under one name would look comparable.

    Args:
        tracker: of the run.
        objective: name of the loss.
        validation_steps: optimizer steps between validations.
    """

    def __init__(self, tracker: NoOpTracker, objective: str, validation_steps: int = 1) -> None:
        super().__init__()
        self.tracker = tracker
        self.objective = objective
        self.validation_steps = validation_steps

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "tracking"

    @property
    def version(self) -> str:
        """Run id of the tracker."""
        return self.tracker.run_id

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Do nothing: `tracking.run` logs the parameters of the stage."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics; Lightning's own metric `epoch` is left out."""
        named = {name: f"{name}_{self.objective}" if name.endswith("loss") else name for name in metrics}
        values = {named[name]: value for name, value in metrics.items() if name != "epoch"}
        self.tracker.log_metrics(values, step=(step or 0) + 1)

    def log_image(self, key: str, image: ByteArray, step: int) -> None:
        """Log an image uint8 [H, W, 3] after `step` optimizer steps, numbered by validation from 0.

        MLflow's tile begins at step 0 and is empty if nothing was logged there.
        """
        self.tracker.log_image(f"{key}_by_validation", image, step=max(0, -(-step // self.validation_steps) - 1))
