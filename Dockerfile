# gradwire as a container: a server that computes with NumPy, or on NVIDIA GPUs.
#
#   docker build -t gradwire .
#   docker run --rm -p 127.0.0.1:50051:50051 --stop-timeout 40 gradwire serve --insecure
#
#   docker build -t gradwire-gpu --target gpu .
#   docker run --rm --gpus all -p 127.0.0.1:50051:50051 --stop-timeout 40 gradwire-gpu \
#     serve --insecure
#
# In its own network a container listens on every address, and the server asks
# whether it may do so in plaintext. It may where the port is published on loopback
# alone, as here; for more, give it certificates: "TLS" in docs/operating.md.
#
# The second image has CUDA's libraries from their Python packages; the host needs its
# driver and the NVIDIA container toolkit, nothing else of CUDA.
#
# Every option of `gradwire serve` is also a variable GRADWIRE_...; every other
# command runs in place of the server: docker run --rm gradwire check
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS source
RUN python -m venv /opt/gradwire
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY cli cli
COPY client client
COPY protos protos
COPY server server

FROM source AS build-cpu
RUN /opt/gradwire/bin/pip install --no-cache-dir --disable-pip-version-check '.[server]' \
    && /opt/gradwire/bin/pip uninstall --yes pip setuptools

FROM source AS build-gpu
# 13, or 12 for hosts whose driver is older than 580.
ARG CUDA=13
RUN /opt/gradwire/bin/pip install --no-cache-dir --disable-pip-version-check ".[server,cuda${CUDA}]" \
    && /opt/gradwire/bin/pip uninstall --yes pip setuptools

FROM ${PYTHON_IMAGE} AS base
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin gradwire
ENV PATH=/opt/gradwire/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    GRADWIRE_LISTEN=0.0.0.0:50051
USER 10001:10001
EXPOSE 50051
# The server drains on SIGTERM for GRADWIRE_GRACE seconds (30), so whoever stops
# the container has to wait that long: Docker's own default is 10.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["gradwire", "health", "--timeout", "4"]
ENTRYPOINT ["gradwire"]
CMD ["serve"]

FROM base AS gpu
COPY --from=build-gpu /opt/gradwire /opt/gradwire
# Which devices, and which parts of the driver, the NVIDIA container runtime
# mounts. CuPy and CUDA keep the kernels that they have compiled under /tmp, the
# one place that can be written to where the root file system is read-only.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    CUPY_CACHE_DIR=/tmp/cupy \
    CUDA_CACHE_PATH=/tmp/cuda

FROM base AS cpu
COPY --from=build-cpu /opt/gradwire /opt/gradwire
