"""The settings of a server, and their documentation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from gradwire_protocol.limits import MIB
from gradwire_server import backend_names
from gradwire_server.backend_names import AUTO


@dataclass(frozen=True)
class Settings:
    """The operator's settings.

    Each field is a flag of ``gradwire serve`` (``--max-jobs``), an environment variable
    (``GRADWIRE_MAX_JOBS``) and a key of its TOML file (``max-jobs``).

    Raises:
        ValueError: A value is out of range; the text names the field.
    """

    listen: tuple[str, ...] = ("127.0.0.1:50051",)
    """Address to listen on, HOST:PORT or unix:PATH; may be given repeatedly. Port 0
    takes a free port."""

    data_listen: str = "0"
    """Port for direct connections, beside which large jobs send their elements: PORT of
    the hosts of the TCP addresses in listen, or HOST:PORT; off: none. Port 0 takes a
    free port. Its TLS and who may connect in plaintext are those of listen."""

    data_advertise: str | None = None
    """Address of data-listen for clients that reach it at another one, HOST:PORT or
    :PORT of the host that the client has called. Unset: that host, and its port."""

    metrics_listen: str | None = None
    """Address of a port for Prometheus, HOST:PORT or PORT of 127.0.0.1: /metrics, in
    plaintext and without credentials. Port 0 takes a free port."""

    metrics_tenants: bool = False
    """Whether metrics count jobs, bytes and seconds of each tenant, with its name."""

    traces: bool = False
    """Whether to send a trace of each call by OTLP (OpenTelemetry). The variables
    OTEL_* say where to and how much, as OTEL_EXPORTER_OTLP_ENDPOINT. Without it, calls
    are traced if the process has a tracer provider of its own."""

    health_listen: str | None = None
    """Address of a port for health probes alone, HOST:PORT or PORT of 127.0.0.1,
    in plaintext and without credentials: a kubelet's gRPC probe speaks no TLS. Port 0
    takes a free port."""

    tls_cert: Path | None = None
    """PEM file with the server's certificate and its chain up to the authority. With it
    all TCP addresses use TLS; unix sockets never do. This file and the two below are
    reloaded when they change."""

    tls_key: Path | None = None
    """PEM file with the private key of tls-cert, not encrypted."""

    tls_client_ca: Path | None = None
    """PEM file with the authorities that sign clients' certificates: a client without a
    certificate of theirs cannot connect. Unset: any client can."""

    insecure: bool = False
    """Whether addresses other than loopback and unix sockets may be served without TLS.
    Everybody on that network can then read the traffic."""

    backend: str = AUTO
    """Backend: numpy (the CPU), cupy (CUDA devices), the name of an installed backend,
    or auto: cupy if a CUDA device responds, otherwise numpy."""

    devices: tuple[int, ...] = ()
    """Numbers of the devices to compute on, as 0,2. Unset: all that respond. numpy has
    one, 0."""

    device_memory_limit: int | None = None
    """Most bytes of each device's own memory that the jobs and sessions on it may hold
    together. Unset: nine tenths of the device's memory. No effect if the device is the
    CPU."""

    cpu_threads: int | None = None
    """Threads that compute with NumPy, each with one BLAS thread; BLAS is limited to
    one in the whole process. Unset: one for each processor that the affinity and the
    control groups' quota allow. 0: one thread, and BLAS keeps its own threads."""

    cpu_niceness: int = 5
    """Added niceness of the threads that compute with NumPy (nice(1), 0 to 19), so that
    messages and small calls do not wait for a large product. No effect where threads
    have no niceness of their own (on Linux they do)."""

    memory_limit: int | None = None
    """Most bytes that all jobs and open calls may hold together. Unset: half of the
    memory of the machine, or of what its control groups (containers, systemd, Slurm)
    allow."""

    keep_memory: bool = True
    """Whether the process keeps the memory freed by a job for the next job, until no
    job has run for 15 seconds. No effect if the C library is not glibc."""

    max_jobs: int = 64
    """Most jobs that run at once."""

    max_queue: int = 256
    """Most jobs that wait for their turn; one more is refused as BUSY."""

    row_block_bytes: int | None = None
    """Bytes of the operands' rows that are computed together. With n, k and the dtype
    it decides how many rows a block has, and so a result's last bits. Unset: 16 MiB
    with numpy, 32 MiB with cupy."""

    keep_limit: int | None = None
    """Most bytes that sessions may keep for their tensors: on each device with memory
    of its own, else all together. They count in device-memory-limit, else in
    memory-limit. Unset: half of that limit."""

    session_lease_max: float = 3600.0
    """Longest lease of a session: seconds without a call after which the server closes
    it and frees its memory. A client may ask for less."""

    state_dir: Path | None = None
    """Directory where the server saves the states of sessions whose clients ask for it,
    with a folder for each tenant, so that training goes on after a restart. It is
    created if missing. Unset: sessions end with the server."""

    allow_shared_memory: bool = False
    """Whether clients on the same host may have jobs computed in memory shared with the
    server. Shared memory counts in memory-limit."""

    auth_tokens: Path | None = None
    """File of hashed tokens with the tenant of each, see gradwire token. If this,
    auth-jwks or auth-certificates is given, every call must prove its tenant."""

    auth_jwks: Path | None = None
    """JSON Web Key Set with the public keys of an issuer; the issuer's JWTs are
    accepted as tokens."""

    auth_jwt_audience: str | None = None
    """Audience (aud) that JWTs must name: an issuer's tokens may be for other services.
    Needed with auth-jwks."""

    auth_jwt_issuer: str | None = None
    """Issuer (iss) that JWTs must name. Needed with auth-jwks."""

    auth_jwt_claim: str = "sub"
    """JWT claim that names the tenant."""

    auth_certificates: bool = False
    """Whether the certificate of a client without a token names its tenant: by the
    common name, or else by the only subject alternative name. Needs tls-client-ca."""

    auth_health: bool = False
    """Whether health checks need a token too. Probes of containers and load balancers
    have none."""

    tenant_max_jobs: int | None = None
    """Most jobs of one tenant that run at once. Unset: no limit per tenant. The
    auth-tokens file may override this and the other limits per tenant."""

    tenant_memory_limit: int | None = None
    """Most bytes that the jobs and open calls of one tenant may hold."""

    tenant_max_queue: int | None = None
    """Most jobs of one tenant that wait for their turn."""

    tenant_keep_limit: int | None = None
    """Most bytes that the sessions of one tenant may keep together. Unset: as
    keep-limit."""

    tenant_max_sessions: int | None = None
    """Most sessions of one tenant at once. Unset: 64."""

    idle_timeout: float = 60.0
    """Seconds after which a job is ended if its client does not send the expected
    message or does not read its results."""

    grace: float = 30.0
    """Seconds for running jobs to finish when the server stops. After that a job is
    ended, with a checkpoint if its client takes checkpoints."""

    def __post_init__(self) -> None:
        if not self.listen:
            raise ValueError("listen is empty: at least one address is needed")
        if self.backend != AUTO and not backend_names.entry_points(self.backend):
            raise ValueError(
                f"backend is {self.backend!r}: expected one of {backend_names.listed()}"
            )
        self._check_tls()
        self._check_data()
        if self.metrics_tenants and self.metrics_listen is None:
            raise ValueError(
                "metrics_tenants is set without metrics_listen: nothing serves metrics"
            )
        for number in self.devices:
            if number < 0:
                raise ValueError(f"devices names {number}: expected at least 0")
            if self.devices.count(number) > 1:
                raise ValueError(f"devices names {number} twice")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name} is {value}: expected at least {least}")

    def _check_data(self) -> None:
        no_tcp = all(each.startswith("unix:") for each in self.listen)
        if no_tcp and self.data_listen not in ("0", "off"):
            raise ValueError(
                f"data_listen is {self.data_listen!r}, and listen has no TCP address:"
                " direct connections are for its clients only"
            )
        address = self.data_advertise
        if address is None:
            return
        _, _, port = address.rpartition(":")
        if (
            ":" not in address
            or not re.fullmatch("[0-9]{1,5}", port)
            or not (0 < int(port) < 65536)
        ):
            raise ValueError(
                f"data_advertise is {address!r}: expected HOST:PORT or :PORT"
            )
        if self.data_listen == "off":
            raise ValueError(
                "data_advertise is set beside data_listen off: nothing listens there"
            )

    def _check_tls(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            given, missing = "tls_cert", "tls_key"
            if self.tls_cert is None:
                given, missing = missing, given
            raise ValueError(f"{given} is set without {missing}: they go together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError(
                "tls_client_ca is set without tls_cert: the server needs its own "
                "certificate to ask clients for theirs"
            )
        if self.insecure and self.tls_cert is not None:
            raise ValueError(
                "insecure is set beside tls_cert, with which nothing goes over TCP "
                "in plaintext: leave one of them out"
            )


_LEAST: dict[str, float] = {
    "cpu_threads": 0,
    "cpu_niceness": 0,
    "memory_limit": 16 * MIB,
    "device_memory_limit": 16 * MIB,
    "max_jobs": 1,
    "max_queue": 0,
    "tenant_max_jobs": 1,
    "tenant_memory_limit": 4 * MIB,
    "tenant_max_queue": 0,
    "tenant_keep_limit": 0,
    "tenant_max_sessions": 1,
    "row_block_bytes": 1,
    "keep_limit": 0,
    "session_lease_max": 1.0,
    "idle_timeout": 0.01,
    "grace": 0,
}
