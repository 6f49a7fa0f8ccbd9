# SPDX-License-Identifier: MIT
"""The engines behind a proxy: whether they answer, and what they have to do."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import httpx

from ucm_sdk.proxy.metrics import HEALTHY, INSTANCE_RUNNING, ProxyMetrics
from ucm_sdk.proxy.options import EngineOptions, InstanceOptions, Role, RoutingOptions
from ucm_sdk.proxy.requests import ProxyError
from ucm_sdk.proxy.routing import Candidate, SeenPrompts, choose
from ucm_sdk.proxy.turns import Queue

logger = logging.getLogger(__name__)

Stage: TypeAlias = Literal["prefill", "decode"]

ROLES: Final[dict[Stage, frozenset[Role]]] = {
    "prefill": frozenset({"prefill"}),
    "decode": frozenset({"decode", "both"}),
}
_OK: Final = 200
_KEPT_S: Final = 2.0
"""Idle connections; less than what engines wait before they close one."""
_REQUESTS_PER_CLIENT: Final = 32
_IDLE_PER_CLIENT: Final = 8
"""For every request httpx's pool goes through all of its connections, and asks idle ones whether
they are still open."""


@dataclass(slots=True)
class _Client:
    client: httpx.AsyncClient
    running: int = 0


class Instance:
    """An engine's server."""

    def __init__(
        self, options: InstanceOptions, engines: EngineOptions, verify: ssl.SSLContext
    ) -> None:
        """Know it; nothing is sent yet."""
        self.options = options
        self.healthy = False
        self.draining = False
        self.running = 0
        self.turn = 0
        self.error = "not asked yet"
        self.doubted = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()
        self.bad_checks = 0
        """In a row."""
        self.changed_at = time.time()
        self._engines, self._verify = engines, verify
        self._clients: list[_Client] = []
        self.control = self._new_client()
        """For what is not a client's request."""

    @contextmanager
    def client(self) -> Iterator[httpx.AsyncClient]:
        """Count a request and yield what it is sent by."""
        one = next((one for one in self._clients if one.running < _REQUESTS_PER_CLIENT), None)
        if one is None:
            one = _Client(self._new_client())
            self._clients.append(one)
        one.running += 1
        self.running += 1
        self.idle.clear()
        try:
            yield one.client
        finally:
            one.running -= 1
            self.running -= 1
            if not self.running:
                self.idle.set()

    async def close(self) -> None:
        """Close all connections."""
        for client in (self.control, *(one.client for one in self._clients)):
            await client.aclose()

    def _new_client(self) -> httpx.AsyncClient:
        headers = {"accept-encoding": "identity", "user-agent": "ucm-proxy"}
        if self.options.api_key is not None:
            headers["authorization"] = f"Bearer {self.options.api_key.get_secret_value()}"
        timeout = httpx.Timeout(self._engines.idle_s, connect=self._engines.connect_s, pool=None)
        return httpx.AsyncClient(
            base_url=self.options.url,
            headers=headers,
            verify=self._verify,
            # The proxy decides whom it talks to, and not its environment.
            trust_env=False,
            timeout=timeout,
            limits=httpx.Limits(
                max_connections=None,
                max_keepalive_connections=_IDLE_PER_CLIENT,
                keepalive_expiry=_KEPT_S,
            ),
        )

    @property
    def name(self) -> str:
        """By which it is spoken of."""
        return self.options.name

    def describe(self) -> dict[str, Any]:
        """Return what an operator wants to know."""
        return {
            "name": self.name,
            "url": self.options.url,
            "role": self.options.role,
            "healthy": self.healthy,
            "draining": self.draining,
            "running": self.running,
            "max_running": self.options.max_running,
            "error": self.error,
            "since_s": round(time.time() - self.changed_at, 1),
        }


class Instances:
    """All of them."""

    def __init__(
        self, routing: RoutingOptions, engines: EngineOptions, metrics: ProxyMetrics
    ) -> None:
        """Begin without any."""
        self._routing = routing
        self._engines = engines
        self._metrics = metrics
        self._instances: dict[str, Instance] = {}
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._seen: dict[Stage, SeenPrompts] = {
            stage: SeenPrompts(routing.most_pieces) for stage in ROLES
        }
        self._turn = 0
        self._queues: dict[Stage, Queue] = {stage: Queue() for stage in ROLES}
        self._closing: set[asyncio.Task[None]] = set()
        authorities = str(engines.ca_file) if engines.ca_file else None
        self._verify = ssl.create_default_context(cafile=authorities)

    def __iter__(self) -> Iterator[Instance]:
        """Go through them."""
        return iter(list(self._instances.values()))

    def get(self, name: str) -> Instance:
        """Return one; raises ``ProxyError`` where there is none of that name."""
        if name not in self._instances:
            raise ProxyError(404, f"there is no instance {name!r}")
        return self._instances[name]

    async def add(self, options: InstanceOptions) -> Instance:
        """Add an instance and ask it for its health; raises ``ProxyError`` for a name in use."""
        if options.name in self._instances:
            raise ProxyError(409, f"there is an instance {options.name!r} already; remove it first")
        instance = Instance(options, self._engines, self._verify)
        self._instances[options.name] = instance
        await self._check(instance)
        if self._instances.get(options.name) is instance:
            self._watchers[options.name] = asyncio.create_task(self._watch(instance))
        return instance

    def remove(self, name: str) -> None:
        """Forget an instance; what it is doing goes on."""
        instance = self.get(name)
        del self._instances[name]
        if (watcher := self._watchers.pop(name, None)) is not None:
            watcher.cancel()
        self._forget(instance)
        for gauge in (HEALTHY, INSTANCE_RUNNING):
            self._metrics.forget(gauge, name, instance.options.role)
        self._wake_all()
        closing = asyncio.create_task(self._close(instance))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    def drain(self, name: str, *, draining: bool) -> Instance:
        """Give an instance nothing new, or end that."""
        instance = self.get(name)
        instance.draining = draining
        self._wake_all()
        return instance

    def one_of(self, stage: Stage) -> Instance | None:
        """Return any instance for a stage that answers, whatever it has to do."""
        return next(iter(self._usable(stage, ())), None)

    def any_of(self, stage: Stage) -> bool:
        """Whether an instance for a stage answers and is not being drained."""
        return bool(self._usable(stage, ()))

    async def pick(
        self, stage: Stage, pieces: Sequence[bytes], tried: Sequence[str], timeout_s: float
    ) -> Instance | None:
        """Return the best instance that was not tried, as soon as one has room.

        None where none is left.  Raises ``ProxyError`` when all have as much as they may for so
        long.
        """
        queue, woken = self._queues[stage], False
        deadline = asyncio.get_running_loop().time() + timeout_s
        while usable := self._usable(stage, tried):
            # Who comes now comes after those who wait.
            if woken or not queue:
                found = self._best(stage, usable, pieces)
                if found is not None:
                    return found
            left_s = deadline - asyncio.get_running_loop().time()
            try:
                await queue.wait(tuple(tried), timeout_s=left_s, first=woken)
            except TimeoutError:
                msg = f"every {stage} instance has as many requests as it may"
                raise ProxyError(503, msg, retry_after_s=1) from None
            woken = True
        return None

    def _best(
        self, stage: Stage, usable: Sequence[Instance], pieces: Sequence[bytes]
    ) -> Instance | None:
        if all(one.running >= one.options.max_running for one in usable):
            return None
        seen = self._seen[stage]
        known = seen.known(pieces, [one.name for one in usable])
        name = choose(
            (
                Candidate(one.name, one.running, one.options.max_running, one.turn, known[one.name])
                for one in usable
            ),
            self._routing.policy,
            spread=self._routing.spread,
        )
        if name is None:
            return None
        self._turn += 1
        self._instances[name].turn = self._turn
        seen.add(pieces, name)
        return self._instances[name]

    @contextmanager
    def using(self, instance: Instance) -> Iterator[httpx.AsyncClient]:
        """Count a request as the instance's, and yield what it is sent by."""
        try:
            with instance.client() as client:
                self._show_running(instance)
                yield client
        finally:
            self._show_running(instance)
            for stage, queue in self._queues.items():
                if instance.options.role in ROLES[stage]:
                    queue.freed(instance.name)

    def failed(self, instance: Instance, error: Exception) -> None:
        """Note that an instance did not do what it should: it is asked for its health at once."""
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            self._set(instance, healthy=False, error=describe(error))
        instance.doubted.set()

    def _usable(self, stage: Stage, tried: Sequence[str]) -> list[Instance]:
        return [
            one
            for one in self._instances.values()
            if one.options.role in ROLES[stage]
            and one.healthy
            and not one.draining
            and one.name not in tried
        ]

    async def _watch(self, instance: Instance) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._engines.health_every_s):
                    await instance.doubted.wait()
            instance.doubted.clear()
            await self._check(instance)

    async def _check(self, instance: Instance) -> None:
        try:
            async with asyncio.timeout(self._engines.health_timeout_s):
                response = await instance.control.get(instance.options.health_path)
            fine = response.status_code == _OK
            problem = "" if fine else f"the health check was answered with {response.status_code}"
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            self._set(instance, healthy=False, error=describe(error))
            return
        except Exception as error:  # noqa: BLE001 - a watcher that ends would leave it as it is
            fine, problem = False, f"the health check was not answered: {describe(error)}"
        instance.bad_checks = 0 if fine else instance.bad_checks + 1
        # A busy instance is late now and then.
        enough = instance.bad_checks >= self._engines.health_failures
        self._set(instance, healthy=fine or (instance.healthy and not enough), error=problem)

    def _set(self, instance: Instance, *, healthy: bool, error: str) -> None:
        changed, instance.healthy, instance.error = healthy != instance.healthy, healthy, error
        # Another of its name may have come since it was removed.
        known = self._instances.get(instance.name) is instance
        if known:
            self._metrics.set(HEALTHY, int(healthy), instance.name, instance.options.role)
        if not changed:
            return
        instance.changed_at = time.time()
        if healthy:
            logger.info("instance %s answers", instance.name)
        else:
            logger.warning("instance %s is left out: %s", instance.name, error)
            if known:
                # One that comes back has started anew.
                self._forget(instance)
        self._wake_all()

    def _wake_all(self) -> None:
        for queue in self._queues.values():
            queue.changed()

    def _show_running(self, instance: Instance) -> None:
        if self._instances.get(instance.name) is instance:
            labels = (instance.name, instance.options.role)
            self._metrics.set(INSTANCE_RUNNING, instance.running, *labels)

    def _forget(self, instance: Instance) -> None:
        for seen in self._seen.values():
            seen.forget(instance.name)

    async def _close(self, instance: Instance) -> None:
        await instance.idle.wait()
        await instance.close()

    async def close(self) -> None:
        """End the health checks and close all connections."""
        for watcher in self._watchers.values():
            watcher.cancel()
        for closing in self._closing:
            closing.cancel()
        await asyncio.gather(*self._watchers.values(), *self._closing, return_exceptions=True)
        for instance in self._instances.values():
            await instance.close()


def describe(error: Exception | str) -> str:
    """Return what an error says, or at least what it is."""
    return str(error) or type(error).__name__
