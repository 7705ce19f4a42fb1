"""Services: PostgreSQL, object store, MLflow, Prefect. The pipeline does not import this package."""
