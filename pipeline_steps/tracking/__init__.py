"""Experiment tracking: the only package that imports mlflow. `client/tracker.py` shows its use.

Stores that exist keep working: names that they hold are constants and do not follow renames in the code. These are run tags
(`sonify.spool`, `sonify.entry`, `sonify.logged`, `sonify.ledger`, `promotion.line`, `dvc.inputs`, `dvc.md5...`), the fields of
promotion log entries, aliases, artifact paths, the experiment and the registered model.
"""

from pipeline_steps.tracking.client.tracker import NoOpTracker, Tracker, run

__all__ = ["NoOpTracker", "Tracker", "run"]
