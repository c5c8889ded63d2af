"""The services of docker-compose.yml find each other, and the files that they mount."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = read("docker-compose.yml")["services"]
    return found


def resolved(texts: Iterable[str]) -> list[str]:
    """The texts where no variable is set."""
    return [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text) for text in texts]


def published(service: dict[str, Any]) -> list[tuple[str, ...]]:
    """Host, its port, and the container's port."""
    return [tuple(each.split(":")) for each in resolved(service.get("ports", ()))]


def test_every_file_that_is_mounted_exists(services: dict[str, dict[str, Any]]) -> None:
    mounted = [
        volume.split(":")
        for service in services.values()
        for volume in service.get("volumes", ())
        if volume.startswith("./")
    ]
    assert len(mounted) > 2
    for source, _, mode in mounted:
        assert (ROOT / source).exists()
        assert mode == "ro"


def test_prometheus_reads_the_metrics_of_every_server(
    services: dict[str, dict[str, Any]],
) -> None:
    listening = {
        name: service["environment"]["GRADWIRE_METRICS_LISTEN"]
        for name, service in services.items()
        if "serve" in service.get("command", ())
    }
    (job,) = read("deploy/prometheus/prometheus.yml")["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    assert dict.fromkeys(found["names"], f"0.0.0.0:{found['port']}") == listening


def test_envoy_finds_the_servers_of_its_profile(
    services: dict[str, dict[str, Any]],
) -> None:
    aliases = {
        alias
        for service in services.values()
        if service.get("profiles") == ["scale"] and "networks" in service
        for alias in service["networks"]["default"]["aliases"]
    }
    envoy = read("deploy/proxies/envoy.yaml")["static_resources"]
    (listener,) = envoy["listeners"]
    published = services["envoy"]["ports"][0].rpartition(":")[2]
    assert str(listener["address"]["socket_address"]["port_value"]) == published
    (cluster,) = envoy["clusters"]
    (endpoints,) = cluster["load_assignment"]["endpoints"]
    addresses = [
        each["endpoint"]["address"]["socket_address"]
        for each in endpoints["lb_endpoints"]
    ]
    assert {address["address"] for address in addresses} == aliases
    assert {address["port_value"] for address in addresses} == {50051}


def test_grafana_asks_the_prometheus_of_its_profile(
    services: dict[str, dict[str, Any]],
) -> None:
    (source,) = read("deploy/grafana/provisioning/datasources/prometheus.yml")[
        "datasources"
    ]
    published = services["prometheus"]["ports"][0].rpartition(":")[2]
    assert source["url"] == f"http://prometheus:{published}"
    (provider,) = read("deploy/grafana/provisioning/dashboards/gradwire.yml")[
        "providers"
    ]
    mounts = [volume.split(":")[1] for volume in services["grafana"]["volumes"]]
    assert provider["options"]["path"] in mounts


def test_direct_connections_reach_the_port_that_a_server_tells_its_clients(
    services: dict[str, dict[str, Any]],
) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    default = re.findall(r"GRADWIRE_DATA_LISTEN=(\d+)", dockerfile)
    exposed = re.findall(r"^EXPOSE (\d+) (\d+)$", dockerfile, re.MULTILINE)
    assert [("50051", *default)] == exposed
    for name, service in services.items():
        if "serve" not in service.get("command", ()):
            continue
        environment = service["environment"]
        (port,) = resolved([environment.get("GRADWIRE_DATA_LISTEN", *default)])
        if service.get("ports"):
            call, data = published(service)
            assert data == (call[0], port, port), name
        else:
            (alias,) = service["networks"]["default"]["aliases"]
            assert environment["GRADWIRE_DATA_ADVERTISE"] == f"{alias}:{port}"


def test_services_can_run_beside_each_other(
    services: dict[str, dict[str, Any]],
) -> None:
    taken = [each[:2] for service in services.values() for each in published(service)]
    assert len(taken) > 5
    assert len(taken) == len(set(taken))
