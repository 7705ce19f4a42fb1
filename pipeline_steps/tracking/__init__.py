"""Experiment tracking: the only package that imports mlflow.

    with tracking.run("train", layout, config, inputs=[layout.pairs]) as tracker:
        tracker.log_metrics({"train/loss": 0.3}, step=10)

Entries are appended to a queue on local disk; a child process uploads them to MLflow. See `client/tracker.py`.

Stores that exist keep working: names that they hold are constants and do not follow renames in the code. These are run tags
(`sonify.spool`, `sonify.entry`, `sonify.logged`, `sonify.ledger`, `promotion.line`, `dvc.inputs`, `dvc.md5...`), the fields of
promotion log entries, aliases, artifact paths, the experiment and the registered model.
"""

from pipeline_steps.tracking.client.tracker import NoOpTracker, Tracker, run

__all__ = ["NoOpTracker", "Tracker", "run"]
