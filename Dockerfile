# The gateway and the controller; engines run in vLLM's own images.
FROM python:3.11-slim-bookworm AS build
WORKDIR /build
COPY requirements/gateway.lock ./
RUN python -m venv /opt/penstock \
    && /opt/penstock/bin/pip install --no-cache-dir --require-hashes --only-binary :all: -r gateway.lock
COPY pyproject.toml README.md ./
COPY serving serving
COPY ratelimit ratelimit
COPY loadtests loadtests
RUN /opt/penstock/bin/pip install --no-cache-dir --no-deps .

FROM python:3.11-slim-bookworm
RUN useradd --system --uid 10001 --no-create-home penstock
COPY --from=build /opt/penstock /opt/penstock
ENV PATH=/opt/penstock/bin:$PATH \
    PYTHONUNBUFFERED=1
USER 10001
EXPOSE 8080 9090
ENTRYPOINT ["penstock"]
CMD ["gateway", "--config", "/etc/penstock/penstock.yaml"]
