"""Experiment tracking: the only package that imports mlflow, and only inside functions.

    with tracking.run("train", layout, config, inputs=[layout.pairs]) as tracker:
        tracker.log_metrics({"train/loss": 0.3}, step=10)

Everything is written to a local spool first; a child process carries it to MLflow. See `tracker.py`.
"""

from pipeline_steps.tracking.client.tracker import NoOpTracker, Tracker, run

__all__ = ["NoOpTracker", "Tracker", "run"]
