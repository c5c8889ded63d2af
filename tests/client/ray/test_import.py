"""Ray is a matter of those who ask for it."""

from __future__ import annotations

import subprocess
import sys


def python(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_importing_gradwire_does_not_import_ray() -> None:
    python(
        "import sys, gradwire, gradwire_server, gradwire_ray.pool, gradwire_cli.app;"
        "assert 'ray' not in sys.modules"
    )


def test_without_ray_the_error_says_what_to_install() -> None:
    python(
        "import sys; sys.modules['ray'] = None\n"
        "try:\n"
        "    import gradwire.ray\n"
        "except ImportError as error:\n"
        "    assert 'pip install \"gradwire[ray]\"' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('imported')\n"
    )
