"""``gradwire compute``."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter
from rich import progress
from rich.text import Text

from gradwire import Progress, Receipt
from gradwire_cli import sdk_warnings
from gradwire_cli.files.npy import RAW_DTYPES
from gradwire_cli.files.operands import (
    Operands,
    open_operands,
    result_dtypes,
    wanted_results,
)
from gradwire_cli.files.results import ResultFiles, ResultSpec
from gradwire_cli.options import (
    FLAG,
    PLAINTEXT,
    Addresses,
    Seconds,
    SecurityOptions,
    one_of,
    split,
)
from gradwire_cli.private_server import connected
from gradwire_cli.terminal.printable import printable
from gradwire_cli.terminal.tables import console, properties
from gradwire_cli.terminal.units import format_bytes, format_seconds
from gradwire_protocol.dtypes import ACCUMULATORS, WIRE_DTYPES, Dtype
from gradwire_protocol.matrices import Matrix

_LIST = Parameter(converter=split, n_tokens=1, negative=(), show_default=False)

app = App(
    name="compute",
    usage="Usage: gradwire compute [X] [W] [DY] --out DIR [OPTIONS]",
    help="""
    Compute gradients of matrices in .npy files.

    Reads X (m, n), W (n, k) and dY (m, k) from files. Writes Y = X W, dX = dY Wᵀ
    and dW = Xᵀ dY to DIR/y.npy, DIR/dx.npy and DIR/dw.npy. Two operands suffice
    for one result: gradwire compute --w w.npy --dy dy.npy writes dX. Rows stream
    from file to file, so memory does not grow with their number. Result files
    appear when all of them are complete; a failed or interrupted run leaves no
    files.

    Without --address, a private server in this process computes. bfloat16
    results are written like NumPy writes them, as raw 2-byte elements (|V2);
    array.view(ml_dtypes.bfloat16) restores the numbers.
    """,
)


@app.default
def compute(
    x: Path | None = None,
    w: Path | None = None,
    dy: Path | None = None,
    *,
    out: Annotated[Path, Parameter(metavar="DIR")],
    results: Annotated[
        tuple[str, ...] | None, _LIST, Parameter(metavar="NAMES")
    ] = None,
    address: Addresses = (),
    security: SecurityOptions = PLAINTEXT,
    dtype: Annotated[Dtype | None, one_of(RAW_DTYPES)] = None,
    result_dtype: Annotated[tuple[str, ...], _LIST, Parameter(metavar="DTYPES")] = (),
    wire_dtype: Annotated[Dtype | None, one_of(WIRE_DTYPES)] = None,
    dw_accumulator: Annotated[Dtype | None, one_of(ACCUMULATORS)] = None,
    allow_tf32: Annotated[bool, FLAG] = False,
    block_rows: Annotated[
        Literal["auto"] | int | None, Parameter(metavar="ROWS|auto", show_choices=False)
    ] = None,
    spread: Annotated[bool, FLAG] = False,
    checksum: Annotated[bool, FLAG] = False,
    verify: Annotated[bool, FLAG] = False,
    force: Annotated[bool, FLAG] = False,
    quiet: Annotated[bool, FLAG] = False,
    request_id: Annotated[str | None, Parameter(metavar="NAME")] = None,
    connect_timeout: Seconds = 10.0,
    timeout: Seconds | None = None,
) -> None:
    """Compute gradients of matrices in .npy files.

    Args:
        x: X, shape (m, n).
        w: W, shape (n, k).
        dy: dY = dL/dY, shape (m, k).
        out: Output directory; created if missing.
        results: Wanted results, from y,dx,dw,db. Default: all of y,dx,dw
            possible with the given files. db has the column sums of dY.
        address: Server address: HOST:PORT or unix:PATH. May be repeated, or
            dns:///HOST:PORT for every address of a name: the job goes to an
            available server, or, with --spread, to all of them.
        security: TLS and credentials.
        dtype: Dtype of raw 2-byte elements; NumPy saves bfloat16 that way.
        result_dtype: Dtype of all results, or of single ones (dw=float32).
            Default: the operands' dtype.
        wire_dtype: Send float32 operands, and results not in --result-dtype,
            rounded to this dtype: half the bytes.
        dw_accumulator: Dtype of the sums of dW and db over row blocks. Default:
            float64 for float32 and float64 operands, float32 for 16-bit operands.
        allow_tf32: Let a GPU multiply float32 operands in TF32.
        block_rows: Most rows of a row block, a power of two. Smaller blocks let
            results leave earlier, and give other last bits. auto: about an eighth of
            the rows, for a slow link. Default: the server's choice.
        spread: Have all servers, and all of their devices, compute the job together.
            The last bits may differ from those without --spread.
        checksum: Protect all payloads with CRC-32C.
        verify: Verify the results locally with random sums, block by block.
        force: Replace existing result files.
        quiet: Show no progress and no table.
        request_id: Job id in the server's log.
        connect_timeout: Time limit for the server's first answer.
        timeout: Time limit for the job. Default: none.
    """
    given = {Matrix.X: x, Matrix.W: w, Matrix.DY: dy}
    paths = {operand: path for operand, path in given.items() if path is not None}
    wanted = wanted_results(results, paths)
    dtypes = result_dtypes(result_dtype, wanted)
    warnings: dict[str, None] = {}  # each once, in the order in which they came

    def note(record: logging.LogRecord) -> None:
        # Not failed attempts, which others made good.
        if not hasattr(record, "attempt"):
            warnings[record.getMessage()] = None

    with ExitStack() as stack:
        stack.enter_context(sdk_warnings.noted(note))
        operands = open_operands(paths, wanted, stack, raw_as=dtype)
        specs = operands.results(wanted, dtypes)
        files = stack.enter_context(
            ResultFiles(out, specs, replace=force, keep=paths.values())
        )
        show = sys.stderr.isatty() and not quiet
        # Files are named after this block, so an interrupted run leaves none.
        with (
            connected(address, security, connect_timeout, timeout) as (client, server),
            _progress_bar(show=show) as on_progress,
        ):
            stream = client.stream(
                operands.rows(),
                operands.w(),
                results=tuple(specs),
                m=operands.m,
                result_dtype={name: kind.label for name, kind in dtypes.items()},
                wire_dtype=wire_dtype and wire_dtype.label,
                dw_accumulator=dw_accumulator and dw_accumulator.label,
                allow_tf32=allow_tf32,
                block_rows=block_rows,
                spread=spread,
                checksum=checksum,
                verify=verify,
                request_id=request_id,
                on_progress=on_progress,
            )
            with stream:
                for block in stream:
                    for result in wanted:
                        if result.row_wise:
                            files.append(result.label, getattr(block, result.label))
                for result in wanted:
                    if result.is_sum:
                        files.append(result.label, getattr(stream, result.label))
        written = files.commit()
    if not quiet:
        for text in warnings:
            sys.stderr.write(f"gradwire: {printable(text)}\n")
        if len(address) > 1 and not spread:
            server = stream.receipt.server_address
        console().print(
            properties(_summary(server, stream.receipt, operands, specs, written))
        )


class _Rate(progress.ProgressColumn):
    """Bytes a second, in binary units."""

    def render(self, task: progress.Task) -> Text:
        """The mean over the last seconds."""
        rate = task.finished_speed or task.speed
        return Text(f"{format_bytes(rate)}/s" if rate else "")


@contextmanager
def _progress_bar(*, show: bool) -> Iterator[Callable[[Progress], object] | None]:
    """A progress callback with a bar on standard error; None if not shown."""
    if not show:
        yield None
        return
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        _Rate(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console(sys.stderr)) as bar:
        task = bar.add_task("connecting", total=None)
        servers: dict[str, progress.TaskID] = {}

        def update(now: Progress) -> None:
            total = (now.bytes_to_send or 0) + (now.bytes_to_receive or 0)
            for address, rows in (now.rows_by_server or {}).items():
                if address not in servers:
                    servers[address] = bar.add_task(f"  {address}", total=total)
                share = rows / now.m if now.m else 1.0
                bar.update(servers[address], completed=total * share)
            bar.update(
                task,
                description="operands and results"
                if now.jobs_ahead is None
                else f"queued, {now.jobs_ahead} ahead",
                completed=now.bytes_sent + now.bytes_received,
                total=total,
            )

        yield update


def _segments(receipt: Receipt) -> Iterator[tuple[str, str]]:
    """Which servers and devices have computed a spread job."""
    computed = Counter(
        (each.server_address, str(each.device.index) if each.device else "unknown")
        for each in receipt.segments
    )
    devices = Counter(address for address, _ in computed)
    for (address, device), count in sorted(computed.items()):
        where = address if devices[address] == 1 else f"{address}, device {device}"
        yield where, f"{count} of {len(receipt.segments)} segments"


def _summary(
    server: str,
    receipt: Receipt,
    operands: Operands,
    specs: Mapping[str, ResultSpec],
    written: Sequence[Path],
) -> Iterator[tuple[str, str]]:
    for spec, path in zip(specs.values(), written, strict=True):
        yield str(path), f"{' x '.join(map(str, spec.shape))} {spec.dtype.label}"
    yield "job", receipt.job_id
    yield "server", f"{server}, over {receipt.transport}"
    yield "device", f"{receipt.device.backend}: {receipt.device.name}"
    yield "row blocks", f"{receipt.blocks} of {receipt.block_rows} rows"
    yield from _segments(receipt)
    in_dtype = "" if receipt.dtype == operands.dtype.label else f" in {receipt.dtype}"
    moved, seconds = receipt.bytes_received + receipt.bytes_sent, receipt.total_s
    yield (
        "bytes",
        f"{format_bytes(receipt.bytes_received)} of operands{in_dtype}, "
        f"{format_bytes(receipt.bytes_sent)} of results"
        + (f", {format_bytes(moved / seconds)}/s" if seconds else ""),
    )
    m, n, k = operands.m, operands.n, operands.k
    flops = m * sum(Matrix[name.upper()].row_operations(n, k) for name in specs)
    if receipt.verifying_s:
        yield "verified", f"in {format_seconds(receipt.verifying_s)}"
    yield (
        "seconds",
        f"{format_seconds(seconds)}: "
        + ", ".join(
            f"{name} {format_seconds(value)}"
            for name, value in (
                ("queued", receipt.queued_s),
                ("receiving", receipt.receiving_s),
                ("computing", receipt.computing_s),
                ("sending", receipt.sending_s),
            )
        ),
    )
    if receipt.computing_s:
        yield "arithmetic", f"{flops / receipt.computing_s / 1e9:.1f} GFLOP/s"
    yield (
        "server's memory",
        f"{format_bytes(receipt.reserved_bytes)} for this job, "
        f"{format_bytes(receipt.peak_memory_bytes)} peak so far",
    )
