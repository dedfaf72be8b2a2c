# syntax=docker/dockerfile:1
FROM python:3.12-slim AS build
WORKDIR /source
COPY pyproject.toml README.md ./
COPY trio_gateway ./trio_gateway
RUN pip wheel --no-cache-dir --wheel-dir /wheels '.[postgres]'

FROM python:3.12-slim
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --find-links=/wheels 'trio-gateway[postgres]' \
    && useradd --system --no-create-home --uid 10001 gateway
COPY hypercorn.toml /etc/trio-gateway/hypercorn.toml
USER gateway
WORKDIR /tmp
ENV PYTHONUNBUFFERED=1 ENVIRONMENT=production
EXPOSE 8001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s CMD ["python", "-c", \
  "from urllib.request import urlopen; urlopen('http://127.0.0.1:8001/ws/health', timeout=2)"]
ENTRYPOINT ["trio-gateway"]
CMD ["serve", "-c", "/etc/trio-gateway/hypercorn.toml"]
