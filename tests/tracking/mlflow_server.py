"""MLflow's REST application as a process: `python mlflow_server.py DATABASE ARTIFACTS` prints its port."""

import os
import sys

if __name__ == "__main__":
    database, artifacts = sys.argv[1:]
    os.environ["_MLFLOW_SERVER_FILE_STORE"] = database
    os.environ["_MLFLOW_SERVER_REGISTRY_STORE"] = database
    os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = artifacts
    from mlflow.server import app
    from werkzeug.serving import make_server

    httpd = make_server("127.0.0.1", 0, app, threaded=True)
    print(httpd.server_port, flush=True)
    httpd.serve_forever()
