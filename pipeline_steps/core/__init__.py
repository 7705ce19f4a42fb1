"""What every stage speaks: contracts, tables, media shards, memo, errors. No torch, mlflow, prefect or dvc here."""
