"""Settings of `gradwire serve`: flag over variable over file over default."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest

from gradwire_cli import variables
from gradwire_cli.app import app, run
from gradwire_cli.serve_settings import ServeSettings
from gradwire_cli.terminal.logs import LogSettings
from gradwire_server.settings import Settings


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GRADWIRE_")]:
        monkeypatch.delenv(name)


def parsed(*flags: str) -> tuple[ServeSettings, LogSettings]:
    _, bound, _ = app.parse_args(
        ["serve", *flags], exit_on_error=False, print_error=False
    )
    bound.apply_defaults()
    return bound.arguments["settings"], bound.arguments["log"]


def file_of(tmp_path: Path, text: str) -> str:
    path = tmp_path / "gradwire.toml"
    path.write_text(text)
    return str(path)


def refusal(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert run(["serve", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gradwire: ")
    assert err.count("\n") == 1
    return err


OTHER_VALUES: dict[str, tuple[str, Any, str]] = {
    # field: as a flag and a variable, as a value, in TOML
    "listen": ("127.0.0.1:1", ("127.0.0.1:1",), '["127.0.0.1:1"]'),
    "data_listen": ("off", "off", '"off"'),
    "data_advertise": (":9", ":9", '":9"'),
    "metrics_listen": ("9464", "9464", '"9464"'),
    "metrics_tenants": ("true", True, "true"),
    "traces": ("true", True, "true"),
    "health_listen": ("0.0.0.0:9", "0.0.0.0:9", '"0.0.0.0:9"'),
    "tls_cert": ("a.pem", Path("a.pem"), '"a.pem"'),
    "tls_key": ("b.pem", Path("b.pem"), '"b.pem"'),
    "tls_client_ca": ("c.pem", Path("c.pem"), '"c.pem"'),
    "insecure": ("true", True, "true"),
    "backend": ("numpy", "numpy", '"numpy"'),
    "devices": ("0,2", (0, 2), "[0, 2]"),
    "device_memory_limit": ("3GiB", 3 * 2**30, '"3GiB"'),
    "cpu_threads": ("3", 3, "3"),
    "cpu_niceness": ("3", 3, "3"),
    "memory_limit": ("3GiB", 3 * 2**30, '"3GiB"'),
    "keep_limit": ("1GiB", 2**30, '"1GiB"'),
    "session_lease_max": ("90", 90.0, "90"),
    "keep_memory": ("false", False, "false"),
    "max_jobs": ("7", 7, "7"),
    "max_queue": ("0", 0, "0"),
    "row_block_bytes": ("65536", 65536, "65536"),
    "state_dir": ("/var/states", Path("/var/states"), '"/var/states"'),
    "allow_shared_memory": ("true", True, "true"),
    "auth_tokens": ("/etc/t.toml", Path("/etc/t.toml"), '"/etc/t.toml"'),
    "auth_jwks": ("/etc/k.json", Path("/etc/k.json"), '"/etc/k.json"'),
    "auth_jwt_audience": ("gradwire", "gradwire", '"gradwire"'),
    "auth_jwt_issuer": ("https://a.test", "https://a.test", '"https://a.test"'),
    "auth_jwt_claim": ("team", "team", '"team"'),
    "auth_certificates": ("true", True, "true"),
    "auth_health": ("true", True, "true"),
    "tenant_max_jobs": ("3", 3, "3"),
    "tenant_memory_limit": ("3GiB", 3 * 2**30, '"3GiB"'),
    "tenant_max_queue": ("0", 0, "0"),
    "tenant_keep_limit": ("1GiB", 2**30, '"1GiB"'),
    "tenant_max_sessions": ("3", 3, "3"),
    "idle_timeout": ("2.5", 2.5, "2.5"),
    "grace": ("0", 0.0, "0"),
    "log_format": ("json", "json", '"json"'),
    "log_level": ("debug", "debug", '"debug"'),
}


BESIDE = {
    # field: flags without which it is refused
    "metrics_tenants": ("--metrics-listen=0",),
    "tls_cert": ("--tls-key=k.pem",),
    "tls_key": ("--tls-cert=c.pem",),
    "tls_client_ca": ("--tls-cert=c.pem", "--tls-key=k.pem"),
}


def value_of(field: str, *flags: str) -> Any:
    settings, log = parsed(*flags, *BESIDE.get(field, ()))
    return getattr(log if field.startswith("log_") else settings, field)


def test_every_setting_is_tested_here() -> None:
    fields = {f.name for of in (Settings, LogSettings) for f in dataclasses.fields(of)}
    assert set(OTHER_VALUES) == fields


def test_without_anything_said_the_defaults_hold() -> None:
    settings, log = parsed()
    assert dataclasses.asdict(settings) == dataclasses.asdict(Settings())
    assert log == LogSettings()


@pytest.mark.parametrize("field", OTHER_VALUES)
def test_a_setting_is_a_flag_a_variable_and_a_key(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, expected, toml = OTHER_VALUES[field]
    flag = f"--{field.replace('_', '-')}"
    assert value_of(field, f"{flag}={text}") == expected
    for key in (field, field.replace("_", "-")):
        config = file_of(tmp_path, f"{key} = {toml}\n")
        assert value_of(field, "--config", config) == expected
    monkeypatch.setenv(f"GRADWIRE_{field.upper()}", text)
    assert value_of(field) == expected


def test_flags_come_before_variables_and_those_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = file_of(tmp_path, "max-jobs = 3\nmax-queue = 3\ngrace = 3\n")
    monkeypatch.setenv("GRADWIRE_MAX_JOBS", "2")
    monkeypatch.setenv("GRADWIRE_MAX_QUEUE", "2")
    monkeypatch.setenv("GRADWIRE_CONFIG", config)
    settings, _ = parsed("--max-jobs", "1")
    assert (settings.max_jobs, settings.max_queue, settings.grace) == (1, 2, 3.0)


def test_several_addresses_can_be_given_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ("127.0.0.1:0", "unix:/run/gradwire")
    assert value_of("listen", *(f"--listen={a}" for a in expected)) == expected
    config = file_of(tmp_path, f"listen = {list(expected)}\n")
    assert value_of("listen", "--config", config) == expected
    monkeypatch.setenv("GRADWIRE_LISTEN", " ".join(expected))
    assert value_of("listen") == expected


def test_variables_of_others_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # As Kubernetes sets them for a Service called gradwire.
    monkeypatch.setenv("GRADWIRE_PORT", "tcp://10.0.0.1:50051")
    monkeypatch.setenv("GRADWIRE_PORT_50051_TCP", "tcp://10.0.0.1:50051")
    monkeypatch.setenv("GRADWIRE_PORT_50051_TCP_PROTO", "tcp")
    monkeypatch.setenv("GRADWIRE_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("GRADWIRE_SERVICE_PORT_GRPC", "50051")
    monkeypatch.setenv("GRADWIRE_GPU_SERVICE_HOST", "10.0.0.2")
    monkeypatch.setenv("GRADWIRE_ADDRESS", "gpu-node:50051")
    variables.check(os.environ)
    settings, _ = parsed()
    assert dataclasses.asdict(settings) == dataclasses.asdict(Settings())


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("GRADWIRE_MAX_JOB", "GRADWIRE_MAX_JOBS"),
        ("GRADWIRE_AUTH_TOKEN", "GRADWIRE_AUTH_TOKENS"),
        ("GRADWIRE_CONECT_TLS", "GRADWIRE_CONNECT_TLS"),
        ("GRADWIRE_XYZ", None),
    ],
)
@pytest.mark.parametrize("command", ["serve", "info"])
def test_a_variable_that_nothing_reads_is_refused(
    name: str,
    meant: str | None,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, "1")
    assert run([command]) == 2
    out, err = capsys.readouterr()
    hint = f"; did you mean {meant}?" if meant else ""
    assert out == ""
    assert err == f"gradwire: the environment has an unknown variable: {name}{hint}\n"


def test_every_variable_in_a_help_text_is_known(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    named = set()
    for command in ("serve", "compute", "check", "info", "health", "token new"):
        assert run([*command.split(), "--help"]) == 0
        named |= set(re.findall(r"GRADWIRE_\w+", capsys.readouterr().out))
    assert named == variables.KNOWN - {
        *("GRADWIRE_IMAGE", "GRADWIRE_GPU_IMAGE", "GRADWIRE_PUBLISH")
    }


def test_mistakes_are_one_sentence_that_says_where(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "--max-jobz" in refusal(capsys, "--max-jobz", "3")
    assert "extra" in refusal(capsys, "extra")
    assert "--max-jobs" in refusal(capsys, "--max-jobs", "many")
    for flag in "--max-jobs", "--max-queue", "--cpu-threads", "--tenant-max-jobs":
        refused = refusal(capsys, flag, "8.5")
        assert f"{flag} is '8.5': expected a whole number" in refused
    assert "max_jobs is 0: expected at least 1" in refusal(capsys, "--max-jobs", "0")
    assert "expected one like 4GiB" in refusal(capsys, "--memory-limit", "4G")
    assert "devices is '0,x': expected" in refusal(capsys, "--devices", "0,x")
    assert "devices names -1: expected at least 0" in refusal(capsys, "--devices=-1")
    assert "devices names 2 twice" in refusal(capsys, "--devices", "2,0,2")
    assert "tls_key is set without tls_cert" in refusal(capsys, "--tls-key", "k.pem")
    refused = refusal(capsys, "--backend", "torch")
    assert "backend is 'torch': expected one of auto, cupy, numpy" in refused

    def config(text: str) -> str:
        err = refusal(capsys, "--config", path := file_of(tmp_path, text))
        assert path in err
        return err

    assert "an unknown key: max-jobz" in config("max-jobz = 3")
    assert "unknown key: max-job; did you mean max-jobs?" in config("max-job = 3")
    for table in ("server", "serve", "check", "version"):  # of a command, too
        sentence = config(f"[{table}]\nauth-tokens = 'tokens'")
        assert f"an unknown key: {table}.auth-tokens; settings stand at" in sentence
    assert "an unknown key: serve" in config("serve = true")
    assert "an unknown key: config" in config("config = 'other.toml'")
    assert "has both max-jobs and max_jobs" in config("max-jobs = 1\nmax_jobs = 2")
    assert "[max-jobs]" in config("max-jobs = 'many'")
    assert "is '8.5': expected a whole number" in config("max-jobs = 8.5")
    assert "has no valid settings" in config(f"max-jobs = 0x{'f' * 6000}")
    assert "has no valid settings" in config(f"grace.{'a.' * 5000}b = 1")
    assert "an unknown key: a.a;" in config(f"{'a.' * 5000}b = 1")
    assert "is not a TOML file" in config(f"max-jobs = {'9' * 5000}")
    assert "is not a TOML file" in config(f"devices = {'[' * 5000}")
    assert re.search("is not a TOML file: .*line 1", config("max-jobs = ,"))
    assert "No such file" in refusal(capsys, "--config", str(tmp_path / "nothing"))
    assert "Is a directory" in refusal(capsys, "--config", str(tmp_path))
    monkeypatch.setenv("GRADWIRE_MAX_JOBS", "many")
    assert "GRADWIRE_MAX_JOBS" in refusal(capsys)


def test_help_says_of_every_setting_what_its_one_documentation_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert run(["serve", "--help"]) == 0
    out, _ = capsys.readouterr()
    for field in dataclasses.fields(Settings):
        assert f"--{field.name.replace('_', '-')}" in out
        assert f"GRADWIRE_{field.name.upper()}" in out
    assert "Most jobs that run at once." in out
    assert "16 MiB" in out
