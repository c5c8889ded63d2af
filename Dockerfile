# gradwire as a container: a server that computes with NumPy, or on NVIDIA GPUs.
#
#   docker build -t gradwire .
#   docker run --rm -p 127.0.0.1:50051:50051 -p 127.0.0.1:50052:50052 \
#     --stop-timeout 40 gradwire serve --insecure
#
#   docker build -t gradwire-gpu --target gpu .
#   docker run --rm --gpus all -p 127.0.0.1:50051:50051 -p 127.0.0.1:50052:50052 \
#     --stop-timeout 40 gradwire-gpu serve --insecure
#
# The second port is for direct connections, on which clients send large jobs. Without
# it they send them in the call.
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
#
# What is installed, to the hash, is in deploy/containers/*.lock; `make lock-containers`
# writes those. The image lists its Python packages in CycloneDX:
#
#   docker run --rm --entrypoint cat gradwire /opt/gradwire/share/gradwire/sbom.cdx.json
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS tools
COPY deploy/containers/build.lock /locks/
RUN python -m venv /opt/tools \
    && /opt/tools/bin/pip install --no-cache-dir --disable-pip-version-check \
       --require-hashes --only-binary :all: --requirement /locks/build.lock
ENV PATH=/opt/tools/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
# Without a pip of its own: that of the tools installs.
RUN python3 -m venv --without-pip /opt/gradwire
COPY deploy/containers/install-gradwire /usr/local/bin/

FROM tools AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY cli cli
COPY client client
COPY cluster cluster
COPY protos protos
COPY server server
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheel .

FROM tools AS build-cpu
COPY deploy/containers/cpu.lock /locks/
RUN install-gradwire packages cpu
COPY --from=wheel /wheel /wheel
RUN install-gradwire gradwire server,otel

FROM tools AS build-gpu
# 13, or 12 for hosts whose driver is older than 580.
ARG CUDA=13
COPY deploy/containers/cuda${CUDA}.lock /locks/
RUN install-gradwire packages "cuda${CUDA}"
COPY --from=wheel /wheel /wheel
RUN install-gradwire gradwire "server,otel,cuda${CUDA}"

FROM ${PYTHON_IMAGE} AS base
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin gradwire
# ARGs from before the first FROM are visible again only where they are named.
ARG PYTHON_IMAGE
LABEL org.opencontainers.image.title="gradwire" \
      org.opencontainers.image.description="The gradients of a matrix product, computed on another machine" \
      org.opencontainers.image.vendor="The gradwire maintainers" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${PYTHON_IMAGE}"
ENV PATH=/opt/gradwire/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    GRADWIRE_LISTEN=0.0.0.0:50051 \
    GRADWIRE_DATA_LISTEN=50052
USER 10001:10001
EXPOSE 50051 50052
# The server drains on SIGTERM for GRADWIRE_GRACE seconds (30), so whoever stops
# the container has to wait that long: Docker's own default is 10.
STOPSIGNAL SIGTERM
# On a busy host the command needs seconds to start, before it asks for up to 4.
HEALTHCHECK --interval=10s --timeout=20s --start-period=60s --retries=3 \
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
# Last, as they differ with every commit:
#   --build-arg REVISION=$(git rev-parse HEAD) --build-arg CREATED=$(date -u +%FT%TZ)
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"

FROM base AS cpu
COPY --from=build-cpu /opt/gradwire /opt/gradwire
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
