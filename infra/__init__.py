"""The services around the pipeline: PostgreSQL, object store, MLflow, Prefect. Nothing in the pipeline imports this package."""
