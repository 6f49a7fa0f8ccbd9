# SPDX-License-Identifier: MIT
"""The proxy's configuration."""

from __future__ import annotations

import os
import urllib.parse
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

import pydantic

from ucm_sdk import config
from ucm_sdk.config import Strict
from ucm_sdk.errors import ConfigError
from ucm_sdk.store import check_store_options

Role: TypeAlias = Literal["prefill", "decode", "both"]
Policy: TypeAlias = Literal["prefix", "load", "round_robin"]
Seconds: TypeAlias = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
Secret: TypeAlias = Annotated[pydantic.SecretStr, pydantic.Field(min_length=1)]


class InstanceOptions(Strict):
    """An engine's server."""

    name: str = pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """By which it is spoken of."""
    url: str = pydantic.Field(pattern=r"^https?://[^\s/?#@]+/?$")
    """Where it listens, without a path."""
    role: Role = "both"
    """``prefill`` computes prompts for others; ``decode`` and ``both`` answer, and compute what no
    other has."""
    api_key: Secret | None = None
    """What the engine's server asks of its clients."""
    max_running: int = pydantic.Field(default=256, ge=1)
    """Requests that it is given at a time."""
    health_path: str = pydantic.Field(default="/health", pattern=r"^/[!-~]*$")
    """What is asked whether it is well; SGLang computes a token for ``/health``."""

    @pydantic.field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        # What it would be refused for when it is used.
        parts = urllib.parse.urlsplit(url)
        if not url.isascii() or not url.isprintable() or not parts.hostname or parts.port == 0:
            msg = "an address such as http://host:8000 is needed"
            raise ValueError(msg)
        return url

    @pydantic.field_validator("api_key")
    @classmethod
    def _check_key(cls, key: pydantic.SecretStr | None) -> pydantic.SecretStr | None:
        text = key.get_secret_value() if key is not None else ""
        if not text.isascii() or not text.isprintable():
            msg = "a key of printable ASCII characters is needed"
            raise ValueError(msg)
        return key


class RoutingOptions(Strict):
    """Which instance gets a request."""

    policy: Policy = "prefix"
    """``prefix``: who has seen most of the prompt, unless that one has much more to do."""
    spread: int = pydantic.Field(default=8, ge=0)
    """Requests that an instance which knows the prompt may have more than another."""
    piece_bytes: int = pydantic.Field(default=512, ge=16)
    """Prompts are compared by pieces of so many bytes."""
    most_pieces: int = pydantic.Field(default=200_000, ge=1)
    """Pieces that are remembered."""
    min_prefill_bytes: int = pydantic.Field(default=0, ge=0)
    """Shorter prompts go to a decode instance at once."""


class LimitOptions(Strict):
    """What clients may ask of the proxy."""

    body_bytes: int = pydantic.Field(default=4 << 20, ge=1)
    """The longest body."""
    body_memory_bytes: int = pydantic.Field(default=256 << 20, ge=1)
    """All bodies together that have begun to come and are not whole."""
    headers: int = pydantic.Field(default=64, ge=1)
    """The most headers of a request."""
    header_bytes: int = pydantic.Field(default=32 << 10, ge=256)
    """How long all headers may be together."""
    connections: int = pydantic.Field(default=4096, ge=1)
    """Connections that are open at a time."""
    running: int = pydantic.Field(default=1024, ge=1)
    """Requests that are served at a time."""
    waiting: int = pydantic.Field(default=1024, ge=0)
    """Requests that wait for their turn; more are refused."""
    header_s: Seconds = 10.0
    """How long a connection may be open before the headers of a request have come."""
    body_s: Seconds = 30.0
    """How long a request's body may take to come."""
    write_s: Seconds = 30.0
    """How long a client may take to take 64 KiB of what it is sent."""
    queue_s: Seconds = 30.0
    """How long a request waits for its turn, and again for an instance that has room."""


class EngineOptions(Strict):
    """How instances are dealt with."""

    connect_s: Seconds = 2.0
    """How long a connection to an instance may take."""
    prefill_s: Seconds = 120.0
    """How long a prompt may take on a prefill instance."""
    idle_s: Seconds = 300.0
    """How long a decode instance may send nothing: between events of a stream, or before a whole
    answer."""
    attempts: int = pydantic.Field(default=3, ge=1)
    """Instances that are tried for each part of a request."""
    ready_s: float = pydantic.Field(default=2.0, ge=0, allow_inf_nan=False)
    """How long to wait for the store to have a prompt's KV; after that it is computed again."""
    replay_bytes: int = pydantic.Field(default=4 << 20, ge=0)
    """Up to so much of a stream is remembered, to go on with it on another instance."""
    health_every_s: Seconds = 2.0
    """How often each instance is asked for its health."""
    health_timeout_s: Seconds = 5.0
    """How long that may take."""
    health_failures: int = pydantic.Field(default=3, ge=1)
    """Health checks in a row that are answered late, or badly, before an instance is left out; one
    that takes no connection is left out at once."""
    ca_file: Path | None = None
    """Certificates of authorities that instances' certificates are checked against."""


class ProxyOptions(Strict):
    """The table ``proxy``."""

    host: str = "127.0.0.1"
    """The address to listen on."""
    port: int = pydantic.Field(default=8080, ge=0, le=65535)
    """The port to listen on; 0 for any that is free."""
    tls_certificate: Path | None = None
    """A file with the certificate and its chain; without one, HTTP is served as it is."""
    tls_key: Path | None = None
    """The certificate's key."""
    api_key: Secret | None = None
    """What clients must send as a bearer token; without one, everybody is served."""
    admin_key: Secret | None = None
    """What registers, drains and removes instances; without one, nobody does."""
    instances: tuple[InstanceOptions, ...] = ()
    """The engines' servers; more can be registered while the proxy serves."""
    routing: RoutingOptions = RoutingOptions()
    """Which of them gets a request."""
    limits: LimitOptions = LimitOptions()
    """What clients may ask."""
    engines: EngineOptions = EngineOptions()
    """How instances are dealt with."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            msg = "tls_certificate and tls_key belong together: set both or none"
            raise ValueError(msg)
        twice = [name for name, n in Counter(one.name for one in self.instances).items() if n > 1]
        if twice:
            msg = f"instances: name {twice[0]!r} is used twice; every instance needs its own"
            raise ValueError(msg)
        if not self.instances and self.admin_key is None:
            msg = "there are no instances, and without admin_key none can be registered"
            raise ValueError(msg)
        return self


class ProxyConfig(Strict):
    """What ``ucm proxy serve`` reads."""

    proxy: ProxyOptions
    """See below."""
    store: dict[str, Any] | None = None
    """The engines' store, as they have it; asked whether a prompt's KV is there."""


def load_proxy_config(
    path: Path | None, *, environment: Mapping[str, str] | None = None
) -> ProxyConfig:
    """Return the checked configuration of a file and the environment; raises ``ConfigError``."""
    inline = {} if path is None else {config.CONFIG_FILE_KEY: str(path)}
    values = config.load(inline, environment=os.environ if environment is None else environment)
    # The engines may be configured by the same file.
    values = {key: value for key, value in values.items() if key in ProxyConfig.model_fields}
    if "proxy" not in values:
        msg = "proxy: the table is missing; it names the instances, or an admin_key"
        raise ConfigError(msg)
    found = config.parse(ProxyConfig, values, where="proxy")
    if found.store is not None:
        check_store_options(found.store)
    for name in ("tls_certificate", "tls_key"):
        file = getattr(found.proxy, name)
        if file is not None and not file.is_file():
            msg = f"proxy.{name}={file}: there is no such file"
            raise ConfigError(msg)
    return found
