"""Tests of the Kubernetes files against schemas: objects, jobs of the worker, pods of the RayJob, values of the charts."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from ruamel.yaml import YAML

from infra import passwords
from infra.topology import INFRA, constants

FOLDER = INFRA / "kubernetes"
VERSION = "1.34"
ROLES = {"postgres", "object-store", "mlflow", "prefect", "worker", "stage", "ray"}

CHART_KEYS = {
    # charts/values.yaml of the MLflow repository
    "values-mlflow.yaml": """
        image.repository image.tag replicaCount fullnameOverride server.value_options.host server.value_options.port
        server.value_options.workers server.value_options.app_name server.value_options.allowed_hosts
        mlflow.backendStoreUriFrom.secretKeyRef.name mlflow.backendStoreUriFrom.secretKeyRef.key mlflow.artifactsDestination
        env extraVolumes extraVolumeMounts podLabels.seeing-sound/role resources networkPolicy.enabled""",
    # charts/prefect-server of the Prefect Helm repository
    "values-prefect-server.yaml": """
        global.prefect.image.repository global.prefect.image.prefectTag global.prefect.env server.basicAuth.enabled
        server.basicAuth.existingSecret server.uiConfig.prefectUiApiUrl server.env server.podLabels.seeing-sound/role
        server.containerSecurityContext server.livenessProbe.enabled server.readinessProbe.enabled server.resources
        postgresql.enabled secret.create secret.name""",
    # charts/prefect-worker of the same
    "values-prefect-worker.yaml": """
        worker.apiConfig worker.serverApiConfig.apiUrl worker.basicAuth.enabled worker.basicAuth.existingSecret
        worker.image.repository worker.image.prefectTag worker.config.workPool worker.config.type worker.config.name
        worker.config.limit worker.config.queryInterval worker.config.prefetchSeconds worker.extraEnvVars
        worker.podLabels.seeing-sound/role worker.containerSecurityContext worker.livenessProbe.enabled worker.resources""",
}
"""Keys that the charts read. No package contains their schemas, so new keys must be looked up and added here."""

RAYJOB_KEYS = {
    *("entrypoint", "submissionMode", "backoffLimit", "activeDeadlineSeconds", "shutdownAfterJobFinishes"),
    *("ttlSecondsAfterFinished", "runtimeEnvYAML", "rayClusterSpec"),
}
"""Used keys of RayJobSpec (ray.io/v1); no package contains the operator's schema."""


def documents(name: str) -> list[dict[str, Any]]:
    return [dict(document) for document in YAML(typ="safe").load_all((FOLDER / name).read_text())]


def check(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, VERSION, strict=True)


@pytest.mark.parametrize("name", ["namespace.yaml", "storage.yaml", "network-policies.yaml"])
def test_objects_follow_the_kubernetes_schema(name: str) -> None:
    for document in documents(name):
        check(document)


def test_the_schema_check_can_fail() -> None:
    (policy, *_) = documents("network-policies.yaml")
    policy["spec"]["podSelectr"] = policy["spec"].pop("podSelector")
    with pytest.raises(kubernetes_validate.ValidationError):
        check(policy)


def test_policies_deny_what_they_do_not_name() -> None:
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in documents("network-policies.yaml")}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, spec in policies.items():
        for rule in spec.get("ingress", []):
            assert rule.get("from"), f"{name} allows every source"
        selector = json.dumps(spec["podSelector"])
        named = set(re.findall(r"\"(postgres|object-store|mlflow|prefect|worker|stage|ray)\"", selector))
        assert named <= ROLES, name


def is_allowed(policies: list[dict[str, Any]], to: dict[str, str], namespace: str, pod: dict[str, str], port: int) -> bool:
    """Whether the policies of a pod with labels `to` allow traffic from a pod of another or the same namespace."""

    def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
        required = {key: [value] for key, value in selector.get("matchLabels", {}).items()}
        required |= {rule["key"]: rule["values"] for rule in selector.get("matchExpressions", [])}
        return all(labels.get(key) in values for key, values in required.items())

    return any(
        matches(source.get("podSelector", {}), pod)
        and ("namespaceSelector" in source or namespace == "seeing-sound")
        and port in [entry["port"] for entry in rule.get("ports", [{"port": port}])]
        for spec in (policy["spec"] for policy in policies)
        if "Ingress" in spec["policyTypes"] and matches(spec["podSelector"], to)
        for rule in spec.get("ingress", [])
        for source in rule["from"]
    )


def test_only_the_ray_operator_reaches_the_head() -> None:
    """The operator submits the job over HTTP (submissionMode: HTTPMode) from its own namespace."""
    (job,) = documents("rayjob-embed.yaml")
    assert job["spec"]["submissionMode"] == "HTTPMode"
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    ports = {port["name"]: port["containerPort"] for port in head["spec"]["containers"][0]["ports"]}
    policies, labels = documents("network-policies.yaml"), head["metadata"]["labels"]
    operator = {"app.kubernetes.io/name": "kuberay-operator"}
    assert is_allowed(policies, labels, "ray-system", operator, ports["dashboard"])
    assert not is_allowed(policies, labels, "ray-system", operator, ports["client"])
    assert not is_allowed(policies, labels, "elsewhere", {"app.kubernetes.io/name": "other"}, ports["dashboard"])
    assert is_allowed(policies, labels, "seeing-sound", labels, ports["gcs-server"])


def rendered_job(**values: Any) -> dict[str, Any]:
    """Job that Prefect's Kubernetes worker creates for a run of the pool, rendered without a server."""
    from prefect.utilities.templating import apply_values
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    template = json.loads((FOLDER / "work-pool.json").read_text())
    defaults = {name: field["default"] for name, field in template["variables"]["properties"].items() if "default" in field}
    filled = apply_values(template["job_configuration"], {**defaults, **values}, remove_notset=True)
    configuration = KubernetesWorkerJobConfiguration(**filled)
    configuration.prepare_for_flow_run(flow_run())
    return dict(configuration.job_manifest)


def flow_run() -> Any:
    from uuid import uuid4

    from prefect.client.schemas.objects import FlowRun

    return FlowRun(id=uuid4(), flow_id=uuid4(), name="quiet-owl")


def test_work_pool_makes_a_valid_job_with_gpus() -> None:
    job = rendered_job(gpus=2)
    check(job)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] in {2, "2"}
    assert "flow-run execute" in " ".join(container["args"])
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert environment["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == constants("worker")["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]
    assert not [name for name in environment if "PASSWORD" in name], "passwords come from Secrets"


def test_work_pool_schema_refuses_invalid_values() -> None:
    import jsonschema

    template = json.loads((FOLDER / "work-pool.json").read_text())
    jsonschema.Draft202012Validator.check_schema(template["variables"])
    validator = jsonschema.Draft202012Validator(template["variables"])
    assert validator.is_valid({"gpus": 4, "memory_limit": "128Gi"})
    assert not validator.is_valid({"gpus": -1})
    assert not validator.is_valid({"image_pull_policy": "Sometimes"})
    placeholders = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    assert placeholders == set(template["variables"]["properties"]), "placeholders and variables agree"


def test_ray_job_has_valid_pods_and_keys() -> None:
    (job,) = documents("rayjob-embed.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"].keys() <= RAYJOB_KEYS
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster.keys() == {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
    head = cluster["headGroupSpec"]
    assert head.keys() == {"rayStartParams", "template"}
    groups = cluster["workerGroupSpecs"]
    for group in groups:
        assert group.keys() == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (head, *groups):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "the operator requires strings"
        template = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **group["template"]["metadata"]}}
        check({**template, "spec": group["template"]["spec"]})
        assert group["template"]["metadata"]["labels"]["seeing-sound/role"] == "ray"
        assert group["template"]["spec"]["securityContext"]["runAsNonRoot"] is True


def test_ray_job_runs_a_stage_of_the_graph() -> None:
    (job,) = documents("rayjob-embed.yaml")
    graph = YAML(typ="safe").load((INFRA.parent / "dvc.yaml").read_text())
    *_, command = shlex.split(job["spec"]["entrypoint"])
    assert command.startswith("cd /project && exec dvc ")
    assert command.split()[-1] in graph["stages"]


def test_ray_job_comment_is_a_valid_section() -> None:
    """The parameters in its comment are valid, and their actors fit into a worker's pod."""
    from pipeline_steps.embed.config import EmbedConfig

    text = (FOLDER / "rayjob-embed.yaml").read_text()
    section = YAML(typ="safe").load("\n".join(re.findall(r"^#   (\w.*)$", text, re.MULTILINE)))
    config = EmbedConfig.from_params(section)
    assert (config.executor, config.ray.address) == ("ray", "auto")
    (job,) = documents("rayjob-embed.yaml")
    (worker,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert config.ray.gpus_per_actor <= int(limits["nvidia.com/gpu"])
    assert config.ray.cpus_per_actor / config.ray.gpus_per_actor <= int(limits["cpu"]), "enough CPUs for all GPUs"
    assert config.ray.max_actors * config.ray.gpus_per_actor <= worker["maxReplicas"] * int(limits["nvidia.com/gpu"])


@pytest.mark.parametrize("name", sorted(CHART_KEYS))
def test_values_use_keys_of_the_chart(name: str) -> None:
    (values,) = documents(name)

    chart_keys = set(CHART_KEYS[name].split())

    def leaves(node: Any, path: str) -> list[str]:
        if path in chart_keys or not isinstance(node, dict):
            return [path]
        return [leaf for key, value in node.items() for leaf in leaves(value, f"{path}.{key}".lstrip("."))]

    assert set(leaves(values, "")) == chart_keys


def test_values_have_the_security_defaults() -> None:
    (mlflow,), (server,), (worker,) = (documents(name) for name in sorted(CHART_KEYS))
    assert mlflow["server"]["value_options"]["app_name"] == "basic-auth"
    assert "*" not in mlflow["server"]["value_options"]["allowed_hosts"]
    environment = {
        entry["name"]: entry.get("value") for entry in [*server["server"]["env"], *server["global"]["prefect"]["env"]]
    }
    assert environment["PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED"] == "true"
    assert environment["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    for entry in mlflow["env"]:
        if re.search("PASSWORD|SECRET", entry["name"]):
            assert "secretKeyRef" in entry["valueFrom"], entry["name"]
    shared = {**constants("common"), **constants("mlflow")}
    written = {entry["name"]: entry["value"] for entry in mlflow["env"] if "value" in entry}
    for key in written.keys() & shared.keys():
        assert written[key] == shared[key], key
    for chart in (server["server"], worker["worker"]):
        assert chart["basicAuth"] == {"enabled": True, "existingSecret": "prefect-auth"}
        assert chart["containerSecurityContext"]["readOnlyRootFilesystem"] is True


def test_chart_secrets_reach_kubectl_by_standard_input_alone(tmp_path: Path) -> None:
    """Runs the script with a `kubectl` that records its arguments and its input."""
    import os
    import subprocess

    passwords.create(tmp_path / "secrets")
    tool = tmp_path / "kubectl"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/arguments\ncat >> {tmp_path}/input\necho --- >> {tmp_path}/input\n')
    tool.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["sh", str(FOLDER / "chart-secrets.sh"), str(tmp_path / "secrets")], check=True, env=environment)
    assert set((tmp_path / "arguments").read_text().split()) == {"apply", "-f", "-"}
    objects = [document for document in YAML(typ="safe").load_all((tmp_path / "input").read_text()) if document]
    for document in objects:
        check(document)
    by_name = {document["metadata"]["name"]: document["stringData"] for document in objects}
    assert by_name["prefect-auth"] == {"auth-string": passwords.read(tmp_path / "secrets", "prefect-auth")}
    assert by_name.keys() == {"mlflow-database", "prefect-database", "prefect-auth", "mlflow-client"}
