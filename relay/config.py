"""config.yaml and the environment become frozen settings; every complaint names its key.

Durations are milliseconds once they are read.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
)
from pydantic.networks import IPvAnyNetwork

from relay import account, tenant
from relay.endpoint import canonical_url
from relay.errors import ConfigError
from relay.providers import Account, load
from relay.redact import credentials, passwords
from relay.times import parse_duration

OVERRIDES = {
    "RELAY_DATABASE_URL": "database",
    "RELAY_HOST": "host",
    "RELAY_PORT": "port",
    "RELAY_PUBLIC_URL": "public_url",
    "RELAY_SECRET_KEY": "secret_key",
    "RELAY_ADMIN_KEY": "admin_key",
    "RELAY_LOG_LEVEL": "log_level",
}
_REFERENCE = re.compile(r"\$\{(?:file:(?P<file>[^}]+)|(?P<name>[A-Za-z_][A-Za-z0-9_]*))\}")


def _duration(value: object) -> int:
    if not isinstance(value, str):
        raise ValueError("write a duration with its unit, such as 500ms, 5s, 10m, 2h or 30d")
    milliseconds = parse_duration(value)
    if milliseconds < 1:
        raise ValueError("must be longer than nothing")
    return milliseconds


Duration = Annotated[int, BeforeValidator(_duration)]


def _listed(value: object) -> object:
    if not isinstance(value, str | list):
        raise ValueError("write one secret, or a list of them")
    return [value] if isinstance(value, str) else value


Secrets = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    Field(min_length=1, max_length=10),
    BeforeValidator(_listed),
]


def _tenants(value: object) -> object:
    if value == "all":
        return None
    if not isinstance(value, list) or not value:
        raise ValueError("write `all`, or a list of tenants such as [default, acme]")
    return value


# None is all of them.
Tenants = Annotated[
    Annotated[tuple[Annotated[str, Field(pattern=tenant.NAME)], ...], Field(max_length=1000)] | None,
    BeforeValidator(_tenants),
]


def _sendable(value: str) -> str:
    # Of an empty one nobody should have to think what it means: whoever writes it meant another one.
    if not re.fullmatch(r"[\x21-\x7e]+", value):
        raise ValueError("must be visible ASCII characters without spaces: use `openssl rand -hex 32`")
    return value


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AccountSettings(_Section):
    provider: str
    api_key: str = Field(min_length=1, repr=False)
    webhook_secret: Secrets | None = Field(default=None, repr=False)
    base_url: str | None = None
    timeout: Duration | None = None
    poll_interval: Duration | None = None
    requests_per_minute: int | None = Field(default=None, ge=1)
    requests_per_day: int | None = Field(default=None, ge=1)
    tenants: Tenants = (tenant.DEFAULT,)


class DeliverySettings(_Section):
    timeout: Duration = 15_000
    schedule: tuple[Duration, ...] = Field(
        default=tuple(
            parse_duration(pause) for pause in ("5s", "5m", "30m", "2h", "5h", "10h", "14h", "20h", "24h")
        ),
        max_length=50,
    )
    endpoint_concurrency: int = Field(default=8, ge=1, le=1000)
    concurrency: int = Field(default=256, ge=1, le=10_000)
    progress_interval: Duration = 10_000


class NetworkSettings(_Section):
    allow: tuple[IPvAnyNetwork, ...] = ()
    allow_http: bool = False
    proxy: str | None = Field(default=None, pattern=r"^https?://", repr=False)
    trusted_proxies: tuple[IPvAnyNetwork, ...] = ()


class RetentionSettings(_Section):
    events: Duration = 30 * 86_400_000
    attempts: Duration = 30 * 86_400_000
    bodies: Duration = 30 * 86_400_000
    audit: Duration = 365 * 86_400_000


class MetricsSettings(_Section):
    token: Annotated[str, AfterValidator(_sendable)] | None = Field(default=None, repr=False)
    allow: tuple[IPvAnyNetwork, ...] = ()


class TracingSettings(_Section):
    endpoint: str | None = Field(default=None, pattern=r"^https?://", repr=False)
    headers: Mapping[str, str] = Field(default_factory=dict, repr=False)
    service: str = "relay"
    share: float = Field(default=1.0, ge=0, le=1)
    propagate: bool = False


class Settings(_Section):
    """The whole configuration; `config.example.yaml` says what each key means."""

    public_url: str | None = None
    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    database: str = Field(default="sqlite:///relay.db", repr=False)
    min_free: ByteSize = ByteSize(100 * 1024 * 1024)
    secret_key: str = Field(min_length=1, repr=False)
    previous_secret_keys: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), repr=False)
    admin_key: Annotated[str, AfterValidator(_sendable)] | None = Field(default=None, repr=False)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    accounts: Mapping[Annotated[str, Field(pattern=account.NAME)], AccountSettings] = Field(
        default_factory=dict
    )
    delivery: DeliverySettings = DeliverySettings()
    network: NetworkSettings = NetworkSettings()
    retention: RetentionSettings = RetentionSettings()
    metrics: MetricsSettings = MetricsSettings()
    tracing: TracingSettings = TracingSettings()

    @property
    def secret_keys(self) -> tuple[str, ...]:
        """The newest first: that one seals and signs, all of them open and verify."""
        return (self.secret_key, *self.previous_secret_keys)

    @property
    def origin(self) -> str:
        """What providers call back: `public_url`, or else this machine."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return (self.public_url or f"http://{host}:{self.port}").rstrip("/")

    @property
    def secrets(self) -> list[str]:
        """All that must appear nowhere: what `repr` does not show, of URLs the passwords."""
        return [
            secret
            for text in _hidden(self)
            for secret in (passwords(text) if "://" in text else credentials(text))
        ]


def _hidden(value: Any, hide: bool = False) -> Iterator[str]:
    if isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            yield from _hidden(getattr(value, name), hide or not field.repr)
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _hidden(one, hide)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _hidden(one, hide)
    elif isinstance(value, str) and hide:
        yield value


def load_config(path: Path | None, environment: Mapping[str, str] = os.environ) -> Settings:
    """The settings in a file (else `RELAY_CONFIG`, else `config.yaml`). Raises ConfigError."""
    path = path or Path(environment.get("RELAY_CONFIG", "config.yaml"))
    try:
        document = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} does not exist: copy config.example.yaml there, or name another with --config"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        # Its own message quotes the line, and that may hold a secret.
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise ConfigError(f"{path} is not YAML: {where}{getattr(error, 'problem', None)}") from error
    if document is None:
        document = {}
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must hold keys and values, such as `port: 8080`")
    return read_config(document, environment)


def read_config(document: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> Settings:
    """The settings in a document, with the environment put in. Raises ConfigError naming every bad key."""
    overridden = dict(document)
    for variable, key in OVERRIDES.items():
        if environment.get(variable):
            overridden[key] = environment[variable]
    problems: list[str] = []
    filled = _fill(overridden, "", environment, problems)
    if problems:
        raise ConfigError("\n".join(problems))
    if not filled.get("secret_key"):
        raise ConfigError(
            "secret_key: is missing; set it to 32 random characters or more, for example by"
            " `export RELAY_SECRET_KEY=$(openssl rand -hex 32)`"
        )
    try:
        settings = Settings.model_validate(filled)
    except ValidationError as error:
        raise ConfigError("\n".join(_complaint(one) for one in error.errors())) from error
    if settings.public_url is not None:
        check_url("public_url", settings.public_url, settings, allow_http=True)
    accounts(settings)
    return settings


def accounts(settings: Settings) -> dict[str, Account]:
    """The accounts by name, each with its provider. Raises ConfigError."""
    return {name: _account(name, one, settings) for name, one in settings.accounts.items()}


def _account(name: str, given: AccountSettings, settings: Settings) -> Account:
    key = f"accounts.{name}"
    try:
        provider = load(given.provider)
    except ConfigError as error:
        raise ConfigError(f"{key}.provider: {error}") from error
    base_url = given.base_url or provider.base_url
    check_url(f"{key}.base_url", base_url, settings, allow_http=settings.network.allow_http)
    return Account.at(
        provider,
        name,
        api_key=given.api_key,
        base_url=base_url,
        timeout=given.timeout,
        poll_interval=given.poll_interval,
        requests_per_minute=given.requests_per_minute,
        requests_per_day=given.requests_per_day,
        webhook_secrets=given.webhook_secret or (),
        tenants=given.tenants,
    )


def check_url(key: str, url: str, settings: Settings, *, allow_http: bool) -> None:
    """Raises ConfigError, naming the key, for a URL that must not be used."""
    try:
        canonical_url(url, allow_http=allow_http, allow=settings.network.allow)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error


def _fill(value: Any, key: str, environment: Mapping[str, str], problems: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {
            name: _fill(one, f"{key}.{name}".lstrip("."), environment, problems)
            for name, one in value.items()
        }
    if isinstance(value, list):
        return [_fill(one, f"{key}[{index}]", environment, problems) for index, one in enumerate(value)]
    if not isinstance(value, str):
        return value

    def refer(match: re.Match[str]) -> str:
        name, file = match["name"], match["file"]
        if name is not None:
            if not environment.get(name):
                problems.append(f"{key}: the environment has no {name}: export it, or change this key")
            return environment.get(name, "")
        try:
            return Path(file).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{key}: {file} cannot be read: {getattr(error, 'strerror', None) or error}")
            return ""

    return _REFERENCE.sub(refer, value)


def _complaint(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"] if part != "[key]") or "the configuration"
    if error["type"] == "extra_forbidden":
        return f"{key}: there is no such key; config.example.yaml lists them all"
    if error["type"] == "missing":
        return f"{key}: is missing"
    return f"{key}: {error['msg'].removeprefix('Value error, ')}"
