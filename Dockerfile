# gradwire as a container: a server that computes with NumPy.
#
#   docker build -t gradwire .
#   docker run --rm -p 127.0.0.1:50051:50051 --stop-timeout 40 gradwire
#
# Every option of `gradwire serve` is also a variable GRADWIRE_...; every other
# command runs in place of the server: docker run --rm gradwire check
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
RUN python -m venv /opt/gradwire
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY server server
RUN /opt/gradwire/bin/pip install --no-cache-dir --disable-pip-version-check '.[cli,server]' \
    && /opt/gradwire/bin/pip uninstall --yes pip setuptools

FROM ${PYTHON_IMAGE}
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin gradwire
COPY --from=build /opt/gradwire /opt/gradwire
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
