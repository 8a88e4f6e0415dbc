# Penstock's images, one target each, for linux/amd64:
#
#   docker build --tag penstock .                                            the gateway, the controller, the command
#   docker build --tag penstock-virtual-gpu --target virtual-gpu .           vLLM on a virtual GPU, for trials
#   docker build --tag penstock-loadtest --target loadtest .                 load tests, and `penstock measure`
#
# GPUs are served by vLLM's own image. Everything runs as user 10001, with a read-only root and a writable /tmp; a
# controller also needs its state_dir, /var/lib/penstock, on a volume that outlives it. docs/deploy.md has the rest.

# Give a digest (python@sha256:...) to build the same image again next year.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /build
COPY requirements/build.lock requirements/gateway.lock ./
RUN pip install --no-cache-dir --require-hashes --only-binary :all: -r build.lock \
    && python -m venv --without-pip /opt/penstock \
    && pip --python /opt/penstock install --no-cache-dir --require-hashes --only-binary :all: -r gateway.lock
COPY pyproject.toml README.md ./
COPY serving serving
COPY ratelimit ratelimit
COPY loadtests loadtests
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir dist . \
    && pip --python /opt/penstock install --no-cache-dir --no-deps dist/*.whl

FROM build AS build-loadtest
COPY requirements/loadtest.lock ./
RUN pip --python /opt/penstock install --no-cache-dir --require-hashes --only-binary :all: -r loadtest.lock

# As `make install` does: torch with its dependencies, then the engine without, since the CPU wheel would bring
# companions of torch that are built for CUDA.
FROM build AS build-virtual-gpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements/engine-cpu.lock ./
RUN pip --python /opt/penstock install --no-cache-dir --only-binary :all: --index-url "${TORCH_INDEX}" torch==2.13.0 \
    && pip --python /opt/penstock install --no-cache-dir --only-binary :all: --no-deps -r engine-cpu.lock

FROM ${PYTHON_IMAGE} AS runtime
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Penstock" \
      org.opencontainers.image.description="Rate limits for LLM inference, derived from measured GPU throughput" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# No installer: nothing here uses one, and scanners report it.
RUN useradd --system --uid 10001 --user-group --no-create-home --home-dir /tmp penstock \
    && install --directory --owner penstock --group penstock --mode 0700 /var/lib/penstock \
    && python -m pip uninstall --yes --quiet --root-user-action ignore pip setuptools wheel
ENV PATH=/opt/penstock/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /tmp
STOPSIGNAL SIGTERM
USER 10001:10001

FROM runtime AS loadtest
COPY --from=build-loadtest /opt/penstock /opt/penstock
# The key comes in PENSTOCK_API_KEY.
ENTRYPOINT ["python", "-m", "loadtests"]
CMD ["--help"]

FROM runtime AS virtual-gpu
# vLLM warns that libnuma is missing: its CPU kernels would need it, and a virtual GPU runs none.
COPY --from=build-virtual-gpu /opt/penstock /opt/penstock
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=3s --start-period=180s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
ENTRYPOINT ["penstock"]
CMD ["engine", "--host", "0.0.0.0", "--profile", "h100-llama-3.1-8b", "--model", "llama-3.1-8b"]

# Last, so that a build without a target makes it. One image, two services with their health on different ports: whoever
# runs it says which to probe (gateway: 9090 /health, controller: controller.metrics_port).
FROM runtime AS penstock
COPY --from=build /opt/penstock /opt/penstock
EXPOSE 8080 9090 9091
ENTRYPOINT ["penstock"]
CMD ["gateway", "--config", "/etc/penstock/penstock.yaml"]
