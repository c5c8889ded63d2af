"""The settings of a server: the one place that documents them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gradwire_protocol.limits import MIB


@dataclass(frozen=True)
class Settings:
    """What an operator may choose.

    Each field is a flag of ``gradwire serve`` (``--max-jobs``), an
    environment variable (``GRADWIRE_MAX_JOBS``) and a key of its TOML file
    (``max-jobs``).

    Raises:
        ValueError: A value is out of its range; the text names the field.
    """

    listen: tuple[str, ...] = ("127.0.0.1:50051",)
    """Address to listen on, HOST:PORT or unix:PATH; may be given repeatedly.
    Port 0 takes a free one."""

    tls_cert: Path | None = None
    """PEM file with the certificate that the server shows, and what leads from
    it to its authority. With it all TCP addresses speak TLS; unix sockets
    never do. It and the two below are read anew when they change."""

    tls_key: Path | None = None
    """PEM file with the private key of tls-cert, not encrypted."""

    tls_client_ca: Path | None = None
    """PEM file with the authorities that sign clients' certificates: who has
    none of theirs cannot connect. Unset: anybody can."""

    insecure: bool = False
    """Whether addresses other than loopback and unix sockets may do without
    TLS. Then everybody on that network may read along."""

    backend: Literal["auto", "numpy", "cupy"] = "auto"
    """What computes: numpy (the CPU), cupy (CUDA devices), or auto, which
    takes cupy where a device answers and numpy otherwise."""

    devices: tuple[int, ...] = ()
    """Numbers of the devices that compute, as 0,2. Unset: all that answer.
    numpy has one, 0."""

    device_memory_limit: int | None = None
    """Most bytes of each device's own memory that the jobs on it may hold
    together. Unset: nine tenths of what it has. Where the device is the CPU it
    has no effect."""

    cpu_threads: int | None = None
    """Threads that compute with NumPy, each with one thread of BLAS, to which
    BLAS is limited in the whole process. Unset: one for each processor. 0:
    one, and BLAS keeps its own threads."""

    cpu_niceness: int = 5
    """By how much the threads that compute with NumPy are nicer than the rest
    of the server (nice(1), 0 to 19), so that messages and small calls do not
    wait until a large product is done. Where threads have none of their own
    (they do on Linux) it has no effect."""

    memory_limit: int | None = None
    """Most bytes that all jobs and open calls may hold together. Unset: half
    of the memory that the machine or the container has."""

    keep_memory: bool = True
    """Whether memory that a job frees is kept for the next one, in the whole
    process, until none has run for 15 seconds. Where the C library is
    not glibc it has no effect."""

    max_jobs: int = 64
    """Most jobs that run at once."""

    max_queue: int = 256
    """Most jobs that wait for their turn; one more is refused as BUSY."""

    block_bytes: int | None = None
    """Bytes of the operands' rows that are computed together. With n, k and
    the dtype it decides how many rows a block has, and so a result's last
    bits. Unset: 16 MiB with numpy, 32 MiB with cupy."""

    allow_shared_memory: bool = False
    """Whether clients of the same host may have jobs computed in memory that
    the server shares with them. What they hold counts in memory-limit."""

    auth_tokens: Path | None = None
    """File of hashed tokens with the tenant of each, see gradwire token. Where
    this, auth-jwks or auth-certificates is given, every call has to prove its
    tenant."""

    auth_jwks: Path | None = None
    """JSON Web Key Set with the public keys of an issuer whose JWTs are taken
    as tokens."""

    auth_jwt_audience: str | None = None
    """Audience (aud) that JWTs must name: an issuer's tokens may be for others.
    Needed with auth-jwks."""

    auth_jwt_issuer: str | None = None
    """Issuer (iss) that JWTs must name; needed with auth-jwks."""

    auth_jwt_claim: str = "sub"
    """Claim of a JWT that names the tenant."""

    auth_certificates: bool = False
    """Whether a client that sends no token is the tenant that its certificate
    names: by its common name, or else by its one alternative name. Needs
    tls-client-ca."""

    auth_health: bool = False
    """Whether asking for the server's health needs a token too. Probes of
    containers and load balancers have none."""

    tenant_max_jobs: int | None = None
    """Most jobs of one tenant that run at once. Unset: as many as of all
    together. So it is with the other limits of a tenant, for all of which the
    file of auth-tokens may have others for some."""

    tenant_memory_limit: int | None = None
    """Most bytes that the jobs and open calls of one tenant may hold."""

    tenant_max_queue: int | None = None
    """Most jobs of one tenant that wait for their turn."""

    idle_timeout: float = 60.0
    """Seconds after which a job is ended whose client does not send what the
    server waits for, or does not read what it was sent."""

    grace: float = 30.0
    """Seconds that running jobs have to finish when the server stops. What is not
    done then is ended, with a checkpoint for clients that take one."""

    def __post_init__(self) -> None:
        if not self.listen:
            raise ValueError("listen is empty: at least one address is needed")
        if self.backend not in {"auto", "numpy", "cupy"}:
            raise ValueError(
                f"backend is {self.backend!r}: expected auto, numpy or cupy"
            )
        self._check_tls()
        for number in self.devices:
            if number < 0:
                raise ValueError(f"devices names {number}: expected at least 0")
            if self.devices.count(number) > 1:
                raise ValueError(f"devices names {number} twice")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name} is {value}: expected at least {least}")

    def _check_tls(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            given, missing = "tls_cert", "tls_key"
            if self.tls_cert is None:
                given, missing = missing, given
            raise ValueError(f"{given} is set without {missing}: they go together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError(
                "tls_client_ca is set without tls_cert: who asks for certificates "
                "has to show one"
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
    "block_bytes": 1,
    "idle_timeout": 0.01,
    "grace": 0,
}
