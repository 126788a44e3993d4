FROM python:3.12-slim-bookworm AS build
WORKDIR /src
RUN python -m venv /opt/relay
COPY requirements.lock ./
RUN /opt/relay/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY relay relay
RUN /opt/relay/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps --no-build-isolation .

FROM python:3.12-slim-bookworm
RUN groupadd --gid 10001 relay \
 && useradd --uid 10001 --gid relay --no-create-home --home-dir /var/lib/relay --shell /usr/sbin/nologin relay \
 && install -d -o relay -g relay -m 0700 /var/lib/relay
COPY --from=build /opt/relay /opt/relay
ENV PATH=/opt/relay/bin:$PATH RELAY_HOST=0.0.0.0 RELAY_CONFIG=/etc/relay/config.yaml \
    RELAY_DATABASE_URL=sqlite:////var/lib/relay/relay.db
USER 10001:10001
WORKDIR /var/lib/relay
VOLUME /var/lib/relay
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
  CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ.get('RELAY_PORT', 8080)}/readyz\", timeout=2)"]
ENTRYPOINT ["relay"]
CMD ["serve"]
