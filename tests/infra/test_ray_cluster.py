"""The cluster file against Ray's own schema and Ray's own check of it."""

from __future__ import annotations

import copy
import json
from importlib import resources
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML

from infra.topology import INFRA

CLUSTER: dict[str, Any] = YAML(typ="safe").load((INFRA / "ray/cluster.yaml").read_text())


def schema() -> dict[str, Any]:
    return dict(json.loads(resources.files("ray.autoscaler").joinpath("ray-schema.json").read_text()))


def test_cluster_file_follows_rays_schema() -> None:
    jsonschema.validate(CLUSTER, schema())
    wrong = copy.deepcopy(CLUSTER)
    wrong["available_node_types"]["gpu"]["max_worker"] = wrong["available_node_types"]["gpu"].pop("max_workers")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema())


def test_ray_itself_takes_the_file() -> None:
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    filled = fillout_defaults(copy.deepcopy(CLUSTER))
    validate_config(filled)
    assert filled["head_node_type"] in filled["available_node_types"]


def test_actors_run_on_workers_with_a_gpu_and_nothing_calls_home() -> None:
    types = CLUSTER["available_node_types"]
    assert types[CLUSTER["head_node_type"]]["resources"]["CPU"] == 0
    assert "--num-cpus=0" in " ".join(CLUSTER["head_start_ray_commands"])
    workers = {name: node for name, node in types.items() if name != CLUSTER["head_node_type"]}
    assert all(node["resources"]["GPU"] >= 1 for node in workers.values())
    assert sum(node["max_workers"] for node in workers.values()) <= CLUSTER["max_workers"]
    assert "--env=RAY_USAGE_STATS_ENABLED=0" in CLUSTER["docker"]["run_options"]
    assert "--dashboard-host=127.0.0.1" in " ".join(CLUSTER["head_start_ray_commands"])
