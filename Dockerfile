# The gateway and the controller; engines run in vLLM's own images.
#
# Mount a config at /etc/penstock/penstock.yaml that has `gateway: {host: 0.0.0.0, ...}`, the address of a Redis, replicas
# by URL, and `state_dir: /var/lib/penstock` (for the controller: a volume that outlives the container).
FROM python:3.11-slim-bookworm AS build
WORKDIR /build
COPY requirements/build.lock requirements/gateway.lock ./
RUN pip install --no-cache-dir --require-hashes --only-binary :all: -r build.lock \
    && python -m venv /opt/penstock \
    && /opt/penstock/bin/pip install --no-cache-dir --require-hashes --only-binary :all: -r gateway.lock
COPY pyproject.toml README.md ./
COPY serving serving
COPY ratelimit ratelimit
COPY loadtests loadtests
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir dist . \
    && /opt/penstock/bin/pip install --no-cache-dir --no-deps dist/*.whl

FROM python:3.11-slim-bookworm
RUN useradd --system --uid 10001 --no-create-home penstock \
    && install --directory --owner penstock --mode 0700 /var/lib/penstock
COPY --from=build /opt/penstock /opt/penstock
ENV PATH=/opt/penstock/bin:$PATH \
    PYTHONUNBUFFERED=1
USER 10001
EXPOSE 8080 9090
ENTRYPOINT ["penstock"]
CMD ["gateway", "--config", "/etc/penstock/penstock.yaml"]
