"""Grafana's dashboard, with the figures of a real server in a real Prometheus."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradwire as sdk
from tests.support.credentials import make_tokens
from tests.support.observing import wait_until
from tests.support.serving import running_server

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/gradwire.json").read_text())
EXPRESSIONS = [
    (f"{panel['title']}: {target['legendFormat']}", target["expr"])
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", [])
]
ONLY_ON_GPUS = {"Device memory: {{instance}} device {{device}}"}
"""What a server that computes in host memory has no figures of."""

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="there is no prometheus here"
)


class Prometheus:
    """A Prometheus that reads one server's metrics.

    Args:
        address: Its own address.
    """

    def __init__(self, address: str) -> None:
        self._api = f"http://{address}/api/v1"

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an expression."""
        query = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"{self._api}/query?{query}", timeout=10) as answer:
            series: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return series

    def has(self, expression: str) -> bool:
        """Whether an expression has a series that is not zero."""
        try:
            return any(float(each["value"][1]) > 0 for each in self.query(expression))
        except urllib.error.URLError:  # it is about to start
            return False


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    tokens, text = make_tokens("alice")
    (folder / "tokens.toml").write_text(text)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    stop = threading.Event()
    with running_server(
        metrics_listen="0",
        metrics_tenants=True,
        auth_tokens=str(folder / "tokens.toml"),
        memory_limit=32 << 20,
    ) as server:
        target = urllib.parse.urlsplit(server.metrics_url).netloc
        (folder / "prometheus.yml").write_text(
            "global: { scrape_interval: 250ms }\n"
            "scrape_configs:\n"
            "  - job_name: gradwire\n"
            f"    static_configs: [{{ targets: ['{target}'] }}]\n"
        )
        command = [
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={address}",
        ]
        log = (folder / "log").open("w")
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        clients = threading.Thread(
            target=call_again_and_again, args=(server.address, tokens["alice"], stop)
        )
        clients.start()
        try:
            found = Prometheus(address)
            wait_until(
                lambda: found.has("rate(gradwire_auth_failures_total[3s])"),
                "figures in Prometheus",
                60,
            )
            yield found
        finally:
            stop.set()
            clients.join()
            process.terminate()
            process.wait(20)
            log.close()


def call_again_and_again(address: str, token: str, stop: threading.Event) -> None:
    """Jobs that succeed, jobs that fail, a session, and callers without a token."""
    x = np.ones((64, 64), np.float32)
    too_large = np.zeros((4096, 4096), np.float32)
    with (
        sdk.connect(address, token=token) as client,
        client.session("1MiB") as session,
    ):
        session.put(x)
        while not stop.wait(0.05):
            client.gradients(x, x, x)
            with pytest.raises(sdk.AuthenticationError):
                sdk.connect(address, token=f"gw_{token[:2:-1]}")
            with pytest.raises(sdk.JobTooLargeError):
                client.forward(too_large, too_large)


@pytest.mark.parametrize(
    ("title", "expression"), EXPRESSIONS, ids=[title for title, _ in EXPRESSIONS]
)
def test_an_expression_has_figures(
    prometheus: Prometheus, title: str, expression: str
) -> None:
    asked = expression.replace("$__rate_interval", "3s").replace("$instance", ".*")
    assert "$" not in asked
    if title in ONLY_ON_GPUS:
        assert not prometheus.query(asked)
    else:  # there are none at once where the last scrape took longer than its interval
        wait_until(lambda: bool(prometheus.query(asked)), asked, 30)


def test_the_figures_tell_the_jobs_apart(prometheus: Prometheus) -> None:
    (panel,) = (p for p in DASHBOARD["panels"] if p["title"] == "Ended jobs")
    expression = panel["targets"][0]["expr"]
    asked = expression.replace("$__rate_interval", "3s").replace("$instance", ".*")
    outcomes = {
        each["metric"]["outcome"]: float(each["value"][1])
        for each in prometheus.query(asked)
    }
    assert outcomes["OK"] > 0
