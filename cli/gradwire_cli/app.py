"""The commands, and how their errors reach the user."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from cyclopts import App
from cyclopts.exceptions import CycloptsError, UnknownOptionError, UnusedCliTokensError

from gradwire import GradwireError
from gradwire_cli import variables
from gradwire_cli.commands import (
    certs,
    check,
    compute,
    health,
    info,
    ray,
    serve,
    sessions,
    token,
    top,
)
from gradwire_cli.errors import CommandError, ExitStatus
from gradwire_cli.terminal.printable import printable
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.version import VERSION

app = App(
    name="gradwire",
    version=f"gradwire {VERSION}",
    help="""
    Compute the gradients of a matrix product on another machine.

    From X (m, n), W (n, k) and dY = dL/dY (m, k), a server computes Y = X W,
    dX = dY Wᵀ and dW = Xᵀ dY. It streams results back while operands are still
    arriving.
    """,
    suppress_keyboard_interrupt=False,
)
# The help lists the commands in this order.
_COMMANDS = (serve, compute, check, info, top, health, sessions, token, certs, ray)
for order, command in enumerate(_COMMANDS):
    command.app.sort_key = order
    app.command(command.app)


def run(arguments: Sequence[str]) -> int:
    """Run one command.

    Returns:
        The exit status.
    """
    try:
        variables.check(os.environ)
        status = app(
            arguments,
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
        sys.stdout.flush()
        return int(status or ExitStatus.OK)
    except CycloptsError as error:
        return _fail(_usage(error), ExitStatus.USAGE)
    except CommandError as error:
        return _fail(_with_option(error), error.status)
    except GradwireError as error:
        return _fail(_with_option(error), ExitStatus.FAILED)
    except OSError as error:
        # Standard output cannot be written. The interpreter flushes it at exit,
        # and that flush must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader (head) has closed the pipe
            return ExitStatus.FAILED
        return _fail(f"{error.strerror or error}", ExitStatus.FAILED)


def _fail(sentence: str, status: int) -> int:
    sys.stderr.write(f"gradwire: {printable(sentence)}\n")
    return status


def _with_option(error: Exception) -> str:
    """Return an error's text, with the option that gives what a server asks for."""
    if Reason.CREDENTIALS_INVALID.name not in str(error):
        return str(error)
    return f"{error}; --token-file, or the variable GRADWIRE_TOKEN, gives the token"


def _usage(error: CycloptsError) -> str:
    if isinstance(error, UnknownOptionError) and error.token.source not in {"", "cli"}:
        key = (error.token.keyword or "").strip("[]").replace("][", ".")
        return f"{error.token.source} has an unknown key: {key}"
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        sentence = f"unexpected argument {error.unused_tokens[0]!r}"
    else:
        sentence = " ".join(str(error).split()).removesuffix(".")
    command = " ".join(["gradwire", *(error.command_chain or ())])
    return f"{sentence[:1].lower()}{sentence[1:]}; see {command} --help"
