"""A server's metrics at one moment."""

from __future__ import annotations

import math
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import BadStatusLine, HTTPException, HTTPResponse
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from gradwire_cli.errors import CommandError

DEFAULT_URL = "http://127.0.0.1:9464/metrics"
"""The metrics of ``gradwire serve --metrics-listen 9464``."""

MAX_BYTES = 4 << 20
"""Most bytes of a page. A server's metrics have some tens of KiB, and with 500 tenants
some hundreds."""

_LABELS = {
    "build_info": ("version", "backend"),
    "device_info": ("device", "name", "backend"),
    "tenant_jobs_total": ("tenant",),
}
"""Labels that a server's samples have."""

_NUMBER = re.compile(r"[0-9]{1,9}")

_SHOWN = 200
"""Characters of an error to show: it may quote the page."""


def url_of(given: str) -> str:
    """Return the URL of a server's metrics.

    Args:
        given: A URL, HOST:PORT, or PORT of 127.0.0.1.

    Raises:
        CommandError: It is none of them.
    """
    text = f"127.0.0.1:{given}" if given.isdecimal() else given
    url = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(url)
        complete = parts.scheme in {"http", "https"} and parts.hostname and parts.port
    except ValueError:
        complete = False
    if not complete:
        raise CommandError(
            f"{given!r} is no address of metrics: expected HOST:PORT, a PORT of"
            " 127.0.0.1, or a URL like http://gpu-node:9464/metrics"
        )
    return url if parts.path.strip("/") else f"{url.rstrip('/')}/metrics"


@dataclass(frozen=True, slots=True)
class MetricsPage:
    """All samples of one reading."""

    read_at: float
    """`time.monotonic()` when it was read."""

    samples: Mapping[str, tuple[tuple[Mapping[str, str], float], ...]]
    """Labels and values, by the samples' names without "gradwire_"."""

    def each(self, name: str) -> tuple[tuple[Mapping[str, str], float], ...]:
        """Return the labels and values of the samples of a name."""
        return self.samples.get(name, ())

    def sum(self, name: str, **labels: str) -> float:
        """Return the sum of the samples that have these labels; 0 without any."""
        return sum(
            value for has, value in self.each(name) if labels.items() <= has.items()
        )

    def by(self, name: str, label: str) -> dict[str, float]:
        """Return the sums of the samples for each value of a label."""
        sums: dict[str, float] = {}
        for has, value in self.each(name):
            of = has.get(label, "")
            sums[of] = sums.get(of, 0.0) + value
        return sums


def read_metrics(url: str, timeout_s: float) -> MetricsPage:
    """Read a server's metrics.

    Raises:
        CommandError: There is no answer, or one without gradwire's metrics.
    """
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:  # noqa: S310 - url_of allows http and https only
            text = _body(answer, time.monotonic() + timeout_s).decode()
            read_at = time.monotonic()
        samples: dict[str, list[tuple[Mapping[str, str], float]]] = {}
        for name, sample in _samples(text):
            samples.setdefault(name, []).append((sample.labels, sample.value))
    except urllib.error.HTTPError as error:
        error.close()
        why = f"{error.code} {error.reason[:_SHOWN]}"
        raise CommandError(f"{url} answers {why}") from error
    except ConnectionRefusedError as error:
        raise _nothing_listens(url) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ConnectionRefusedError):
            raise _nothing_listens(url) from error
        raise CommandError(f"{url} cannot be read: {error.reason}") from error
    except TimeoutError as error:
        raise CommandError(f"{url} did not answer within {timeout_s:g} s") from error
    except BadStatusLine as error:
        # gRPC's port, for example: what it sends is no text.
        raise CommandError(f"{url} cannot be read: no HTTP server answers") from error
    except (HTTPException, OSError, ValueError) as error:
        raise CommandError(f"{url} cannot be read: {str(error)[:_SHOWN]}") from error
    if "build_info" not in samples:
        raise CommandError(f"{url} has no metrics of a gradwire server")
    return MetricsPage(read_at, {name: tuple(all_) for name, all_ in samples.items()})


def _body(answer: HTTPResponse, deadline: float) -> bytes:
    """Return an answer's body.

    Raises:
        TimeoutError: It has not come by the deadline: a server that sends a byte now
            and then would be waited for without end.
        ValueError: It is too long.
    """
    body = bytearray()
    while part := answer.read1(1 << 16):
        body += part
        if len(body) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES >> 20} MiB")
        if time.monotonic() > deadline:
            raise TimeoutError
    return bytes(body)


def _samples(text: str) -> Iterator[tuple[str, Sample]]:
    """Yield gradwire's samples with their names without "gradwire_".

    Raises:
        ValueError: The text is no metrics, or those of another program.
    """
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removeprefix("gradwire_")
            if name == sample.name:
                continue
            if not math.isfinite(sample.value):
                raise ValueError(f"{sample.name} is {sample.value}")
            for label in _LABELS.get(name, ()):
                if label not in sample.labels:
                    raise ValueError(f"{sample.name} has no label {label!r}")
            if name == "device_info" and not _NUMBER.fullmatch(sample.labels["device"]):
                raise ValueError(f"{sample.name} has a device without a number")
            yield name, sample


def _nothing_listens(url: str) -> CommandError:
    return CommandError(
        f"nothing listens at {url}: a server has metrics with"
        " gradwire serve --metrics-listen 9464"
    )
