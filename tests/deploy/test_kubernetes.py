"""The manifests of deploy/kubernetes agree with themselves and with the server.

`scripts/check-deploy` has them checked against Kubernetes' schemas. What no schema
knows is here: that selectors, ports, times and settings fit together.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

import gradwire
from tests.cli.conftest import ended_by, started
from tests.support.certificates import Authority
from tests.support.credentials import make_tokens

KUBERNETES = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes"

# What `docs/operating.md` says that jobs take which are cut off.
CUT_OFF_S = 5


def built(overlay: str) -> list[dict[str, Any]]:
    tool = shutil.which("kubectl") or shutil.which("kustomize")
    if tool is None:
        pytest.skip("needs kubectl or kustomize")
    verb = "kustomize" if Path(tool).name == "kubectl" else "build"
    done = subprocess.run(
        [tool, verb, KUBERNETES / "overlays" / overlay],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


class Manifests:
    """The manifests of an overlay."""

    def __init__(self, overlay: str) -> None:
        self.all = built(overlay)
        self.template = self["Deployment"]["spec"]["template"]
        self.pod = self.template["spec"]
        (self.server,) = self.pod["containers"]
        self.settings: dict[str, str] = self["ConfigMap"]["data"]

    def __getitem__(self, kind: str) -> dict[str, Any]:
        (found,) = (each for each in self.all if each["kind"] == kind)
        return found

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.server["ports"]}

    def port_of(self, setting: str) -> int:
        return int(self.settings[setting].rpartition(":")[2])


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def manifests(request: pytest.FixtureRequest) -> Manifests:
    return Manifests(request.param)


def test_every_selector_selects_the_servers(manifests: Manifests) -> None:
    labels = manifests.template["metadata"]["labels"].items()
    selectors = {
        kind: manifests[kind]["spec"][field].get("matchLabels", {})
        for kind, field in (
            ("Deployment", "selector"),
            ("PodDisruptionBudget", "selector"),
            ("NetworkPolicy", "podSelector"),
        )
    }
    selectors["Service"] = manifests["Service"]["spec"]["selector"]
    (spread,) = manifests.pod["topologySpreadConstraints"]
    selectors["spread"] = spread["labelSelector"]["matchLabels"]
    for kind, selector in selectors.items():
        assert selector, kind
        assert selector.items() <= labels, kind
    (namespace,) = {each["metadata"]["namespace"] for each in manifests.all}
    text = (KUBERNETES / "namespace.yaml").read_text()
    assert yaml.safe_load(text)["metadata"]["name"] == namespace


def test_every_port_is_one_that_the_server_listens_on(manifests: Manifests) -> None:
    assert manifests.ports == {
        "grpc": manifests.port_of("GRADWIRE_LISTEN"),
        "data": manifests.port_of("GRADWIRE_DATA_LISTEN"),
        "metrics": manifests.port_of("GRADWIRE_METRICS_LISTEN"),
        "health": manifests.port_of("GRADWIRE_HEALTH_LISTEN"),
    }
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert manifests.server[probe]["grpc"] == {"port": manifests.ports["health"]}
    service = manifests["Service"]["spec"]
    assert service["clusterIP"] == "None"
    for port in service["ports"]:
        assert manifests.ports[port["targetPort"]] == port["port"]
    rules = manifests["NetworkPolicy"]["spec"]["ingress"]
    allowed = [{port["port"] for port in rule["ports"]} for rule in rules]
    assert allowed == [{"grpc", "data"}, {"metrics"}]


def test_direct_connections_are_advertised_at_the_address_of_the_pod(
    manifests: Manifests,
) -> None:
    address, advertised = manifests.server["env"]
    assert address["valueFrom"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    assert advertised == {
        "name": "GRADWIRE_DATA_ADVERTISE",
        "value": f"$({address['name']}):{manifests.ports['data']}",
    }


def test_the_monitor_scrapes_the_metrics_of_the_service(manifests: Manifests) -> None:
    monitor, service = manifests["ServiceMonitor"]["spec"], manifests["Service"]
    wanted = monitor["selector"]["matchLabels"]
    assert wanted
    assert wanted.items() <= service["metadata"]["labels"].items()
    assert [each["port"] for each in monitor["endpoints"]] == ["metrics"]


def test_a_pod_is_killed_only_after_the_server_has_drained(
    manifests: Manifests,
) -> None:
    waits_s = manifests.server["lifecycle"]["preStop"]["sleep"]["seconds"]
    drains_s = int(manifests.settings["GRADWIRE_GRACE"]) + CUT_OFF_S
    assert manifests.pod["terminationGracePeriodSeconds"] > waits_s + drains_s


def test_pods_may_do_no_more_than_they_need(manifests: Manifests) -> None:
    assert manifests.pod["automountServiceAccountToken"] is False
    pod, container = manifests.pod["securityContext"], manifests.server
    assert pod["runAsNonRoot"] is True
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    user = re.search(
        r"^USER (\d+):(\d+)$",
        (KUBERNETES.parents[1] / "Dockerfile").read_text(),
        re.MULTILINE,
    )
    assert user is not None
    assert (pod["runAsUser"], pod["fsGroup"]) == (int(user[1]), int(user[2]))
    requests, limits = (container["resources"][k] for k in ("requests", "limits"))
    assert requests["memory"] == limits["memory"]


def test_the_autoscaler_owns_the_number_of_servers(manifests: Manifests) -> None:
    scaler, deployment = manifests["HorizontalPodAutoscaler"], manifests["Deployment"]
    assert scaler["spec"]["scaleTargetRef"] == {
        "apiVersion": deployment["apiVersion"],
        "kind": deployment["kind"],
        "name": deployment["metadata"]["name"],
    }
    assert "replicas" not in deployment["spec"]


def test_a_server_on_a_gpu_waits_for_the_one_before_to_leave_it() -> None:
    manifests = Manifests("gpu")
    assert manifests.settings["GRADWIRE_BACKEND"] == "cupy"
    assert manifests.server["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert manifests["Deployment"]["spec"]["strategy"]["rollingUpdate"] == {
        "maxSurge": 0,
        "maxUnavailable": 1,
    }


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[tuple[dict[str, str], str, Path]]:
    """A server with the settings of the pod; what it logs first, a token, its files.

    Its volumes are folders here, with the keys that Kubernetes gives to a Secret of
    kind tls, and its ports are free ones of loopback.
    """
    manifests = Manifests("cpu")
    authority = Authority()
    cert, key = (
        Path(name) for name in authority.issue("127.0.0.1").write(tmp_path, "x")
    )
    tokens, text = make_tokens("alice")
    secrets = {
        "gradwire-tls": {
            "tls.crt": cert.read_text(),
            "tls.key": key.read_text(),
        },
        "gradwire-tokens": {"tokens.toml": text},
    }
    mounts = {each["name"]: each for each in manifests.server["volumeMounts"]}
    for volume in manifests.pod["volumes"]:
        folder = tmp_path / mounts[volume["name"]]["mountPath"].lstrip("/")
        folder.mkdir(parents=True)
        if "secret" in volume:
            assert mounts[volume["name"]]["readOnly"] is True
            for name, content in secrets[volume["secret"]["secretName"]].items():
                (folder / name).write_text(content)
    here = {
        name: re.sub(r"^/", f"{tmp_path}/", value)
        if value.startswith("/")
        else re.sub(r"^0\.0\.0\.0:\d+$", "127.0.0.1:0", value)
        for name, value in manifests.settings.items()
    }
    here["GRADWIRE_DATA_LISTEN"] = "0"
    (tmp_path / "ca.pem").write_bytes(authority.cert)
    with started(*manifests.server["args"], env=here, cwd=tmp_path) as process:
        assert process.stderr is not None
        for line in process.stderr:
            record = json.loads(line) if line.startswith("{") else {}
            if record.get("event") == "serving":
                break
        else:
            pytest.fail(f"the server ended: {line}")
        yield record, tokens["alice"], tmp_path
        ended_by(process, signal.SIGTERM)
        assert process.returncode == 0


def test_the_settings_and_secrets_of_the_pod_make_a_server(
    pod: tuple[dict[str, str], str, Path],
) -> None:
    record, token, files = pod
    with grpc.insecure_channel(record["health"]) as channel:
        status = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=10
        )
    assert status.status == health_pb2.HealthCheckResponse.SERVING
    tls = gradwire.Tls(ca=str(files / "ca.pem"))
    with gradwire.connect(record["addresses"], tls=tls, token=token) as client:
        assert client.forward(np.ones((2, 3)), np.ones((3, 1))).sum() == 6
    with gradwire.connect(
        record["addresses"], tls=tls, token=token, transport="direct"
    ) as client:
        assert client.forward(np.ones((2, 3)), np.ones((3, 1))).sum() == 6
    with (
        pytest.raises(gradwire.GradwireError, match="credentials"),
        gradwire.connect(record["addresses"], tls=tls) as client,
    ):
        client.forward(np.ones((2, 3)), np.ones((3, 1)))
    assert (files / "var/lib/gradwire/states").is_dir()
    with urllib.request.urlopen(record["metrics"], timeout=10) as page:
        names = re.findall(rb"^# TYPE (\S+) gauge$", page.read(), re.MULTILINE)
    (metric,) = Manifests("cpu")["HorizontalPodAutoscaler"]["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert name.encode() in names
    adapter = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())
    (rule,) = adapter["rules"]["custom"]
    assert rule["seriesQuery"].startswith(f"{name}{{")
