#!/bin/sh
# Creates the Secrets that the charts expect from the files of `python -m infra.passwords DIR`.
# Values are passed through standard input, never as arguments.
set -eu
folder="$1"
secret() {
  name="$1"
  shift
  {
    printf 'apiVersion: v1\nkind: Secret\nmetadata: {name: %s, namespace: seeing-sound}\ntype: Opaque\nstringData:\n' "$name"
    while [ "$#" -gt 0 ]; do
      printf '  %s: "%s"\n' "$1" "$2"
      shift 2
    done
  } | kubectl apply -f -
}
read_word() { cat "$folder/$1"; }
secret mlflow-database uri "postgresql+psycopg2://mlflow:$(read_word postgres-mlflow)@postgres:5432/mlflow"
secret prefect-database connection-string "postgresql+asyncpg://prefect:$(read_word postgres-prefect)@postgres:5432/prefect"
secret prefect-auth auth-string "$(read_word prefect-auth)"
secret mlflow-client MLFLOW_TRACKING_USERNAME admin MLFLOW_TRACKING_PASSWORD "$(read_word mlflow-password)"
