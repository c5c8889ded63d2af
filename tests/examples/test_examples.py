"""The examples do what they say, started as their docstrings say."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gradwire
from tests.support.serving import BACKEND

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return python(EXAMPLES / f"{name}.py", *arguments)


def python(
    *arguments: object, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"GRADWIRE_BACKEND": BACKEND} | (env or {}),
        check=False,
    )


def assert_ended_well(example: subprocess.CompletedProcess[str]) -> None:
    assert (example.returncode, example.stderr) == (0, "")


def test_quickstart_finds_the_servers_results_right(server_address):
    example = run("quickstart", server_address)
    assert_ended_well(example)
    assert re.findall(r"correct: (\w+)", example.stdout) == ["True"] * 3


def test_quickstart_needs_no_server_to_be_tried():
    example = run("quickstart")
    assert_ended_well(example)
    assert re.findall(r"correct: (\w+)", example.stdout) == ["True"] * 3


def test_examples_say_what_they_do_and_take():
    example = run("train_gpt", "--help")
    assert_ended_well(example)
    assert "A small GPT trains here and through a gradwire server" in example.stdout
    assert "ADDRESS" in example.stdout
    assert run("quickstart", "here:1", "there:1").returncode == 2


def test_a_generated_stub_alone_computes_small_and_large_jobs(server_address):
    example = run("plain_grpc_client", server_address)
    assert_ended_well(example)
    assert "same bits from Compute and ComputeStream: True" in example.stdout
    assert re.findall(r"correct: (\w+)", example.stdout) == ["True"] * 3


def test_a_spread_job_outlives_a_server():
    example = run("spread")
    assert_ended_well(example)
    assert example.stdout.endswith("the same bits as from one server: True\n")
    table = example.stdout.partition("\nserver ")[2]
    found = re.findall(
        r"^\S+:\d+( \(killed\))? +([\d,]+)([ \d]*)$", table, re.MULTILINE
    )
    assert [bool(killed) for killed, _, _ in found] == [True, False, False]
    rows = [int(count.replace(",", "")) for _, count, _ in found]
    assert sum(rows) == 40_000
    assert rows[0] < 30_000
    computed = [number for _, _, numbers in found for number in numbers.split()]
    assert sorted(map(int, computed)) == list(range(10))


@pytest.mark.thorough
def test_rows_from_a_generator_take_no_memory_for_their_number(server_address):
    example = run("row_blocks", server_address)
    assert_ended_well(example)
    moved = int(re.search(r"([\d,]+) MiB moved", example.stdout)[1].replace(",", ""))
    before, after = map(
        int, re.search(r"(\d+) MiB before, (\d+) MiB after", example.stdout).groups()
    )
    assert moved > 900
    assert after - before < 64


@pytest.mark.big
def test_a_torch_layer_learns_through_a_server(server_address):
    pytest.importorskip("torch")
    example = run("torch_linear", server_address)
    assert_ended_well(example)
    assert float(re.search(r"gradient: (\S+)", example.stdout)[1]) < 1e-6
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", example.stdout)]
    assert losses[-1] < losses[0] / 10


@pytest.mark.big
def test_a_gpt_has_the_same_losses_through_a_server(server_address):
    pytest.importorskip("torch")
    example = run("train_gpt", server_address)
    assert_ended_well(example)
    steps = re.findall(r"^ *\d+   (\S+)   (\S+)$", example.stdout, re.MULTILINE)
    assert len(steps) == 5
    assert float(steps[-1][0]) < float(steps[0][0]) - 1
    assert float(re.search(r"losses: (\S+)", example.stdout)[1]) < 1e-4


SECOND_DERIVATIVE = """
import sys
sys.path.insert(0, sys.argv[2])
import gradwire, torch
from torch_linear import RemoteProduct

x, w = (torch.randn(3, 3, dtype=torch.float64, requires_grad=True) for _ in "xw")
with gradwire.connect(sys.argv[1]) as client:
    y = RemoteProduct.apply(client, x, w)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    try:
        dx.sum().backward()
    except RuntimeError as error:
        print(error)
"""


def test_the_torch_layer_refuses_second_derivatives(server_address):
    pytest.importorskip("torch")
    done = subprocess.run(
        [sys.executable, "-c", SECOND_DERIVATIVE, server_address, str(EXAMPLES)],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert "differentiate twice" in done.stdout


def test_the_torch_example_says_what_it_needs(monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    example = run("torch_linear")
    assert example.returncode == 1
    assert example.stderr.strip() == "This example needs PyTorch: pip install torch"


def assert_kept_weights_save_bytes(output: str, d: int) -> None:
    """Check the last table of the demo: three layers of d x d, m rows a step."""
    found = re.findall(
        r"^(NumPy|gradwire, .*?) +([\d.]+) +([\d.]+) +\d+ *$", output, re.MULTILINE
    )
    losses = [float(loss) for _, loss, _ in found]
    assert max(losses) - min(losses) < 1e-4
    m = 128
    sent, kept = 3 * (5 * m * d + 3 * d * d), 3 * 4 * m * d
    assert {name: float(megabytes) for name, _, megabytes in found} == {
        "NumPy": 0,
        "gradwire, weights sent": round(4 * sent / 1e6, 1),
        "gradwire, weights kept": round(4 * kept / 1e6, 1),
    }


def output_in_the_readme() -> list[str]:
    """The lines that the README shows of the demo's output."""
    readme = (EXAMPLES.parent / "README.md").read_text()
    section = readme.partition("## Try it")[2].partition("\n## ")[0]
    shown = section.partition("`make demo` trains")[2]
    return [line for line in shown.splitlines() if line.startswith("    ")]


def form(line: str) -> str:
    """A line without its numbers, paths and widths."""
    words = re.sub(r"\(the same bits\)|\S*/train_digits.png", "", line).split()
    return " ".join(re.sub(r"\d[\d.]*(e-\d+)?", "0", word) for word in words)


NARROWER = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import kept_training
kept_training.WIDTHS = (512, 512, 512, 512)
import train_digits
sys.exit(train_digits.main())
"""


@pytest.mark.thorough
class TestDigits:
    """``make demo``, with fewer epochs."""

    @pytest.fixture(autouse=True)
    def _needs(self):
        for name in ("matplotlib", "sklearn"):  # to import them takes seconds
            if importlib.util.find_spec(name) is None:
                pytest.skip(f"needs {name}")

    def test_both_networks_learn_the_digits_and_a_figure_shows_it(self, tmp_path):
        options = ["--epochs", "4", "--output", tmp_path]
        # Products as small as these take longer on several threads.
        one_thread = {"OPENBLAS_NUM_THREADS": "1"}
        example = python("-c", NARROWER, EXAMPLES, *options, env=one_thread)
        assert example.returncode == 0, example.stderr
        accuracies = re.findall(r"([\d.]+)%", example.stdout)
        assert len(accuracies) == 2
        assert all(float(accuracy) >= 95 for accuracy in accuracies)
        difference = float(re.search(r"losses: (\S+)", example.stdout)[1])
        assert difference < 1e-4
        figure = (tmp_path / "train_digits.png").read_bytes()
        assert figure.startswith(b"\x89PNG")
        assert len(figure) > 30_000
        assert_kept_weights_save_bytes(example.stdout, 512)
        shown = {form(line) for line in example.stdout.splitlines()}
        for line in output_in_the_readme():
            assert form(line) in shown

    @pytest.mark.big
    def test_too_little_learned_is_a_failure_and_leaves_no_server(self, tmp_path):
        example = run("train_digits", "--epochs", 1, "--output", tmp_path)
        assert example.returncode == 1
        assert "is less than 95%" in example.stderr
        assert_kept_weights_save_bytes(example.stdout, 2048)
        address = re.search(r"computes at (\S+)", example.stdout)[1]
        with pytest.raises(gradwire.ConnectError):
            gradwire.connect(address, connect_timeout_s=5)
