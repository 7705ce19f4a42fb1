-- Roles and databases of the services. Run as the superuser by compose's PostgreSQL at its first start and by services.py at every
-- start; repeatable. Passwords come from files in $SERVICES_SECRETS, so they never stand in an argument.
\set ON_ERROR_STOP on
-- A statement that fails is logged with its text: not these.
SET log_min_error_statement = panic;
SET log_statement = none;
\set mlflow `cat "$SERVICES_SECRETS/postgres-mlflow"`
\set prefect `cat "$SERVICES_SECRETS/postgres-prefect"`
SELECT 'CREATE ROLE mlflow LOGIN' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'mlflow') \gexec
SELECT 'CREATE ROLE prefect LOGIN' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'prefect') \gexec
ALTER ROLE mlflow PASSWORD :'mlflow';
ALTER ROLE prefect PASSWORD :'prefect';
SELECT 'CREATE DATABASE mlflow OWNER mlflow' WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'mlflow') \gexec
SELECT 'CREATE DATABASE mlflow_auth OWNER mlflow' WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'mlflow_auth') \gexec
SELECT 'CREATE DATABASE prefect OWNER prefect' WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'prefect') \gexec
REVOKE CONNECT ON DATABASE mlflow, mlflow_auth, prefect FROM PUBLIC;
