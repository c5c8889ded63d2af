"""The manifest of deploy/kubernetes/ray agrees with itself and with `gradwire ray`."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement

from gradwire_ray.settings import PoolSettings

ROOT = Path(__file__).resolve().parents[2]
PATH = ROOT / "deploy" / "kubernetes" / "ray" / "raycluster.yaml"
CLUSTER, POLICY = yaml.safe_load_all(PATH.read_text())


def pods() -> list[dict[str, Any]]:
    spec = CLUSTER["spec"]
    return [
        each["template"] for each in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    ]


def test_ray_is_the_version_that_is_tested() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    (tested,) = (Requirement(r) for r in groups["ray"] if isinstance(r, str))
    assert str(tested.specifier) == f"=={CLUSTER['spec']['rayVersion']}"
    assert (
        f"rayproject/ray:{CLUSTER['spec']['rayVersion']}"
        in (ROOT / "docs" / "ray.md").read_text()
    )


def test_only_workers_get_servers_on_the_port_that_clients_may_call() -> None:
    assert CLUSTER["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (group,) = CLUSTER["spec"]["workerGroupSpecs"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    (server,) = group["template"]["spec"]["containers"]
    assert [port["containerPort"] for port in server["ports"]] == [PoolSettings().port]
    *inside, clients = POLICY["spec"]["ingress"]
    assert clients["ports"] == [{"port": PoolSettings().port}]
    assert not any("ports" in rule for rule in inside)


def test_the_policy_and_the_spread_are_about_these_pods() -> None:
    (group,) = CLUSTER["spec"]["workerGroupSpecs"]
    (spread,) = group["template"]["spec"]["topologySpreadConstraints"]
    selector = POLICY["spec"]["podSelector"]
    assert selector == spread["labelSelector"]
    for pod in pods():
        assert selector["matchLabels"].items() <= pod["metadata"]["labels"].items()


def test_ray_asks_for_a_token_and_outlasts_its_gcs() -> None:
    assert CLUSTER["spec"]["authOptions"] == {"mode": "token"}
    for pod in pods():
        (container,) = pod["spec"]["containers"]
        assert container["env"] == [
            {"name": "RAY_gcs_rpc_server_reconnect_timeout_s", "value": "86400"}
        ]
        assert container["resources"]["requests"] == container["resources"]["limits"]
