"""What all commands have in common, and the small ones: info and health."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import grpc
import pytest

from gradwire_cli.app import run
from tests.cli.conftest import COMMAND, environment, gradwire, refusal_here, sentence
from tests.support.serving import BACKEND, ServerProcess

COMMANDS = (
    "serve",
    "compute",
    "check",
    "info",
    "top",
    "health",
    "sessions",
    "token",
    "ray",
)


def test_version_is_the_distributions() -> None:
    assert gradwire("--version").stdout == f"gradwire {version('gradwire')}\n"


def test_the_installed_script_is_the_same_command() -> None:
    script = Path(sys.executable).with_name("gradwire")
    done = subprocess.run([script, "--version"], capture_output=True, check=True)
    assert done.stdout.decode() == gradwire("--version").stdout


def test_help_names_every_command_and_each_explains_itself(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments in ([], ["--help"]):
        assert run(arguments) == 0
        out, err = capsys.readouterr()
        assert all(command in out for command in COMMANDS)
        assert err == ""
    for command in COMMANDS:
        assert run([command, "--help"]) == 0
        out, err = capsys.readouterr()
        assert out.startswith(f"Usage: gradwire {command}")
        assert err == ""


# What help has in mathematics and bullets, and a table.
@pytest.mark.parametrize(
    ("encoding", "command"), [("ascii", "compute --help"), ("latin-1", "info")]
)
def test_a_terminal_without_unicode_gets_no_traceback(
    server: ServerProcess, encoding: str, command: str
) -> None:
    env = {"PYTHONIOENCODING": encoding, "GRADWIRE_ADDRESS": server.address}
    done = gradwire(*command.split(), env=env, encoding=encoding)
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.strip()


def test_an_unknown_command_is_a_sentence_with_the_nearest_one() -> None:
    done = gradwire("serv")
    assert done.returncode == 2
    assert 'Did you mean "serve"?' in sentence(done)


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [
        ("cyclopts", (), "gradwire[cli]"),
        ("rich", ("--help",), "gradwire[cli]"),
        ("structlog", ("serve",), "gradwire[server]"),
    ],
)
def test_without_an_extra_a_sentence_says_which_to_install(
    missing: str, arguments: tuple[str, ...], extra: str
) -> None:
    program = (
        "import sys; sys.modules[sys.argv.pop(1)] = None;"
        "from gradwire_cli import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, missing, *arguments],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert f"pip install '{extra}'" in sentence(done)


@pytest.mark.parametrize("module", ["rich", "gradwire_cli.app"])
def test_ctrl_c_while_the_command_is_loaded_ends_it_without_noise(module: str) -> None:
    program = """if True:
        import os, signal, sys

        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name.startswith(sys.argv[1]):
                    os.kill(os.getpid(), signal.SIGINT)

        from gradwire_cli import main
        sys.meta_path.insert(0, Finder())
        sys.exit(main())
    """
    done = subprocess.run(
        [sys.executable, "-c", program, module],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
        check=False,
    )
    assert done.stderr == "gradwire: interrupted\n"
    assert done.returncode == 130


def test_info_shows_what_the_server_is(server: ServerProcess) -> None:
    done = gradwire("info", "--address", server.address)
    assert done.returncode == 0
    assert done.stderr == ""
    for text in (server.address, version("gradwire"), BACKEND, "float16, bfloat16"):
        assert text in done.stdout
    assert re.search("direct connections +yes", done.stdout)
    assert re.search("jobs now +0 run, 0 wait", done.stdout)
    assert re.search(r"row blocks +\d+ MiB of operands", done.stdout)


def test_info_is_json_for_programs(server: ServerProcess) -> None:
    done = gradwire("info", "--json", env={"GRADWIRE_ADDRESS": server.address})
    answer = json.loads(done.stdout)
    assert answer["address"] == server.address
    assert answer["contract"] == "gradwire.v1"
    assert answer["draining"] is False
    assert answer["devices"][0]["backend"] == BACKEND
    assert answer["limits"]["max_jobs"] == 64


def test_health_is_a_status_for_probes(server: ServerProcess) -> None:
    for done in (
        gradwire("health", "--address", server.address, "--timeout", "20"),
        gradwire("health", env={"GRADWIRE_ADDRESS": server.address}),
    ):
        assert done.returncode == 0
        assert "SERVING" in done.stdout
        assert done.stderr == ""


@pytest.mark.parametrize("command", ["info", "health"])
def test_an_address_that_nobody_listens_on_is_a_sentence(
    command: str, nobody: str
) -> None:
    done = gradwire(command, "--address", nobody)
    assert done.returncode == 1
    assert nobody in sentence(done)
    done = gradwire(command, "--address", "http://here")
    assert done.returncode == 1
    assert "expected HOST:PORT or unix:PATH" in sentence(done)


def test_a_reader_that_leaves_early_is_no_error(server: ServerProcess) -> None:
    read, write = os.pipe()
    os.close(read)
    done = gradwire("info", "--address", server.address, stdout=write)
    os.close(write)
    assert done.stderr == ""


def test_an_output_that_is_full_is_a_sentence(server: ServerProcess) -> None:
    with Path("/dev/full").open("w") as full:
        done = gradwire("info", "--address", server.address, stdout=full)
    assert done.returncode == 1
    assert done.stderr == "gradwire: No space left on device\n"


@pytest.mark.parametrize("command", ["info", "info --json", "--version"])
def test_an_output_that_is_closed_is_a_sentence(
    server: ServerProcess, command: str
) -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *COMMAND, *command.split()],
        stderr=subprocess.PIPE,
        text=True,
        env=environment({"GRADWIRE_ADDRESS": server.address}),
        check=False,
    )
    assert done.stderr == "gradwire: Bad file descriptor\n"
    assert done.returncode == 1


def test_standard_error_may_be_closed(server: ServerProcess) -> None:
    for arguments, status in (("health",), 0), (("serv",), 2):
        done = subprocess.run(
            ["sh", "-c", 'exec "$@" 2>&-', "sh", *COMMAND, *arguments],
            stdout=subprocess.PIPE,
            env=environment({"GRADWIRE_ADDRESS": server.address}),
            check=False,
        )
        assert done.returncode == status


def test_a_server_without_the_health_protocol_is_a_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = grpc.server(ThreadPoolExecutor(1))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    text = refusal_here(capsys, "health", "--address", f"127.0.0.1:{port}")
    assert "does not speak the health protocol" in text
    text = refusal_here(capsys, "info", "--address", f"127.0.0.1:{port}")
    assert "does not offer gradwire.v1.GradientService" in text
    other.stop(None).wait()


def test_tables_fit_the_terminal_that_they_are_shown_on(server: ServerProcess) -> None:
    outer, inner = pty.openpty()
    env = {"COLUMNS": "60", "TERM": "xterm"}
    done = gradwire("info", "--address", server.address, env=env, stdout=inner)
    os.close(inner)
    shown = os.read(outer, 65536).decode()
    os.close(outer)
    assert done.returncode == 0
    assert "\x1b[1m" in shown


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["info"], "--timeout"),
        (["health"], "--timeout"),
        (["sessions", "list"], "--timeout"),
        (["check"], "--connect-timeout"),
        (["top"], "--timeout"),
        (["top"], "--interval"),
    ],
)
@pytest.mark.parametrize("value", ["0", "-1", "nan", "soon"])
def test_a_duration_that_is_none_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], arguments: list[str], flag: str, value: str
) -> None:
    assert refusal_here(capsys, *arguments, f"{flag}={value}") == (
        f"2 gradwire: {flag} is {value!r}: expected a number of seconds above 0\n"
    )
