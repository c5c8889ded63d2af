"""The alert rules: each fires when it should, for metrics that a server has."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy" / "prometheus" / "alerts.yml"
TESTS = RULES.with_name("alerts_test.yml")


def test_alerts_are_about_metrics_that_there_are() -> None:
    listed = set(
        re.findall(r"`(gradwire_\w+)`", (ROOT / "docs" / "operating.md").read_text())
    )
    text = RULES.read_text()
    named = set(re.findall(r"\bgradwire_\w+", text))
    assert len(named) > 10
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in named} <= listed
    assert set(re.findall(r"\bgradwire_\w+", TESTS.read_text())) <= listed


def test_every_alert_is_tested_to_fire_and_not_to_fire() -> None:
    alerts = re.findall(r"- alert: (\w+)", RULES.read_text())
    assert len(alerts) == len(set(alerts)) > 10
    for alert in alerts:
        checks = re.findall(
            rf"alertname: {alert}\n.*\n *exp_alerts:( \[\])?", TESTS.read_text()
        )
        assert "" in checks, alert
        assert " []" in checks, alert


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not here")
@pytest.mark.parametrize(
    "command", [("check", "rules", str(RULES)), ("test", "rules", str(TESTS))]
)
def test_promtool_agrees(command: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["promtool", *command], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
