# SPDX-License-Identifier: MIT
"""Clients that are slow, greedy or malicious, and those beside them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import trustme
from uvicorn.server import ServerState

from proxy_harness import ADMIN
from ucm_sdk.proxy.options import ProxyConfig
from ucm_sdk.proxy.server import make_server

SECRET = "client's"


@pytest.fixture
def connect() -> Iterator[Callable[[Any], socket.socket]]:
    """Open connections to a proxy."""
    with contextlib.ExitStack() as stack:

        def opened(served: Any) -> socket.socket:
            connection = socket.create_connection(("127.0.0.1", served.port), 10)
            return stack.enter_context(contextlib.closing(connection))

        yield opened


def closed_after(connection: socket.socket) -> float:
    """Return the seconds until the other end hangs up."""
    began = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while connection.recv(65536):
            pass
    return time.monotonic() - began


def request(body: bytes, *headers: str, length: int | None = None) -> bytes:
    lines = ["POST /v1/completions HTTP/1.1", "host: x", "content-type: application/json", *headers]
    lines.append(f"content-length: {len(body) if length is None else length}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@pytest.mark.parametrize(
    "begin",
    [b"", b"P", b"\r\n", b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"],
    ids=["nothing", "a byte", "an empty line", "half of the headers"],
)
def test_headers_that_do_not_come(engines, proxy, connect, begin: bytes) -> None:
    (one,) = engines("D")
    served = proxy({one: "decode"}, limits={"header_s": 0.5})
    connection = connect(served)
    connection.sendall(begin)
    assert 0.3 < closed_after(connection) < 3
    assert served.ask().status_code == 200


def test_headers_that_come_byte_by_byte(engines, proxy, connect) -> None:
    (one,) = engines("D")
    served = proxy({one: "decode"}, limits={"header_s": 0.5})
    connection = connect(served)
    began = time.monotonic()
    with contextlib.suppress(ConnectionError):
        for byte in b"GET /health HTTP/1.1\r\nx-slow: " + b"a" * 1000:
            connection.send(bytes([byte]))
            time.sleep(0.01)
    assert time.monotonic() - began < 3


def test_a_second_request_that_does_not_come(engines, proxy, connect) -> None:
    (one,) = engines("D")
    served = proxy({one: "decode"}, limits={"header_s": 0.5})
    connection = connect(served)
    connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
    assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    # What ends the keep-alive timer must not end all timers.
    connection.sendall(b"\r\nGET /hea")
    assert closed_after(connection) < 3


def test_headers_without_end(engines, proxy, connect) -> None:
    (one,) = engines("D")
    served = proxy({one: "decode"}, limits={"header_bytes": 4096})
    connection = connect(served)
    sent = 0
    connection.sendall(b"GET /health HTTP/1.1\r\nx-long: ")
    with contextlib.suppress(ConnectionError):
        for _ in range(1000):
            sent += connection.send(b"a" * 1024)
            time.sleep(0.001)
    assert sent < 300_000
    assert served.ask().status_code == 200


@pytest.mark.parametrize(("count", "status"), [(8, 200), (9, 431), (500, 431)])
def test_many_headers(engines, proxy, connect, count: int, status: int) -> None:
    (one,) = engines("D")
    served = proxy({one: "decode"}, limits={"headers": 10})
    body = json.dumps({"prompt": "x"}).encode()
    connection = connect(served)
    connection.sendall(request(body, *(f"x-{n}: y" for n in range(count - 1))))
    assert connection.recv(65536).split()[1] == str(status).encode()
    assert len(one.asked) == (status == 200)


def test_headers_that_are_too_long_in_one_piece(engines, proxy, connect) -> None:
    (one,) = engines("D")
    served = proxy({one: "decode"}, limits={"header_bytes": 1024})
    connection = connect(served)
    connection.sendall(request(b'{"prompt": "x"}', "x-long: " + "a" * 2000))
    assert connection.recv(65536).split()[1] == b"431"
    assert not one.asked


def test_the_next_request_before_the_answer(engines, proxy, connect) -> None:
    (one,) = engines("D")
    one.gap_s = 0.2
    served = proxy({one: "decode"}, limits={"header_s": 0.5})
    connection = connect(served)
    connection.sendall(request(b'{"prompt": "x", "stream": true}'))
    assert connection.recv(1024)
    connection.sendall(b"GET /health HTTP/1.1\r\nx-long: ")
    assert closed_after(connection) < 2
    deadline = time.monotonic() + 5
    while one.answering:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_headers_behind_a_body(engines, proxy, connect) -> None:
    (one,) = engines("D")
    served = proxy({one: "decode"}, api_key=SECRET)
    connection = connect(served)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    body = b'f\r\n{"prompt": "x"}\r\n0\r\n'
    connection.sendall(head + body + f"authorization: Bearer {SECRET}\r\n\r\n".encode())
    assert b"200 OK" not in connection.recv(65536)
    assert not one.asked


def test_more_connections_than_may_be_open(engines, proxy, connect) -> None:
    (one,) = engines("D")
    served = proxy({one: "decode"}, limits={"connections": 3})
    some = [connect(served) for _ in range(3)]
    assert closed_after(connect(served)) < 2
    some[0].close()
    deadline = time.monotonic() + 5
    while len(served.server.server_state.connections) > 2:
        assert time.monotonic() < deadline
    assert served.ask().status_code == 200


def test_bodies_that_fill_the_memory(engines, proxy, connect) -> None:
    (one,) = engines("D")
    served = proxy({one: "decode"}, limits={"body_memory_bytes": 100_000})
    some = [connect(served) for _ in range(4)]
    for connection in some:
        connection.sendall(request(b"a" * 30_000, length=60_000))
    assert b" 503 " in some[-1].recv(1024)
    for connection in some:
        connection.close()
    deadline = time.monotonic() + 5
    while served.server.server_state.connections:
        assert time.monotonic() < deadline
    # What they held is free again.
    later = connect(served)
    body = json.dumps({"prompt": "x" * 80_000}).encode()
    later.sendall(request(body)[:70_000])
    time.sleep(0.1)
    later.sendall(request(body)[70_000:])
    assert b" 200 " in later.recv(1024)


class Transport(asyncio.Transport):
    """A connection whose client takes as much as a test says."""

    def __init__(self, left: list[int]) -> None:
        super().__init__()
        self.left, self.written, self.aborted = left, b"", False

    def get_write_buffer_size(self) -> int:
        return self.left.pop(0) if len(self.left) > 1 else self.left[0]

    def write(self, data: bytes) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


@pytest.mark.parametrize(("left", "aborted"), [([9, 9], True), ([9, 5, 2, 0], False)])
def test_a_client_that_leaves_the_end_of_an_answer(left: list[int], aborted: bool) -> None:
    async def run() -> Transport:
        options = {"admin_key": ADMIN, "limits": {"write_s": 0.05}}
        config = make_server(ProxyConfig.model_validate({"proxy": options})).config
        config.load()
        protocol = config.http_protocol_class(config, ServerState(), {})
        transport = Transport(left)
        protocol.connection_made(transport)
        protocol.data_received(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
        await asyncio.sleep(0.5)
        assert transport.written.startswith(b"HTTP/1.1 200")
        protocol.connection_lost(ConnectionError())
        return transport

    assert asyncio.run(run()).aborted == aborted


def test_a_client_that_is_slow_and_steady(engines, proxy, connect) -> None:
    (one,) = engines("D")
    served = proxy({one: "decode"}, limits={"write_s": 1})
    slow = connect(served)
    body = {"prompt": "x", "max_tokens": 600_000}
    slow.sendall(request(json.dumps(body).encode(), "connection: close"))
    size, began = 0, time.monotonic()
    while part := slow.recv(100_000):
        size += len(part)
        time.sleep(0.05)
    assert time.monotonic() - began > 2
    assert size > 5_000_000
    assert served.metric("ucm_proxy_requests_total", result="answered") == 1


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_long(engines, proxy, connect, announced: bool) -> None:
    (one,) = engines("D")
    served = proxy({one: "decode"}, limits={"body_bytes": 1000})
    connection = connect(served)
    if announced:
        connection.sendall(request(b"", length=10**12))
    else:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        connection.sendall(head + b"".join(b"100\r\n" + b"a" * 256 + b"\r\n" for _ in range(8)))
    assert connection.recv(65536).split()[1] == b"413"
    assert closed_after(connection) < 3
    assert not one.asked


def test_a_body_that_does_not_come(engines, proxy, connect) -> None:
    (one,) = engines("D")
    served = proxy({one: "decode"}, limits={"body_s": 0.3})
    connection = connect(served)
    connection.sendall(request(b'{"prompt', length=100))
    assert connection.recv(65536).split()[1] == b"408"
    assert closed_after(connection) < 3


def test_a_client_that_takes_nothing(engines, proxy, connect) -> None:
    (one,) = engines("D")
    served = proxy({one: "decode"}, limits={"write_s": 0.5})
    slow = connect(served)
    body = {"prompt": "x", "stream": True, "max_tokens": 200_000}
    slow.sendall(request(json.dumps(body).encode()))
    deadline = time.monotonic() + 20
    while not served.metric("ucm_proxy_requests_total", result="too_slow"):
        assert time.monotonic() < deadline
        assert served.ask().status_code == 200
        time.sleep(0.05)
    assert served.metric("ucm_proxy_running") == 0
    deadline = time.monotonic() + 10
    while one.answering:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # Nothing is kept for it: what has not left this process is thrown away.
    deadline = time.monotonic() + 5
    while served.server.server_state.connections:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b"[1]",
        b"{}",
        b'{"prompt": 3}',
        b'{"messages": []}',
        b"\xff\xfe",
        b'{"prompt": "x", "stream": {"a": [NaN]}',
    ],
)
def test_a_body_that_says_nothing(engines, proxy, body: bytes) -> None:
    (one,) = engines("D")
    served = proxy({one: "decode"})
    with served.client() as client:
        response = client.post("/v1/completions", content=body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert not one.asked


@pytest.mark.parametrize("text", ["\ud800 half", "\x00", "😀" * 300, ""])
def test_any_text_is_a_prompt(engines, proxy, text: str) -> None:
    (one,) = engines("D")
    served = proxy({one: "decode"}, routing={"piece_bytes": 16})
    with served.client() as client:
        body = json.dumps({"prompt": text, "model": "\udfff"}).encode()
        assert client.post("/v1/completions", content=body).status_code == 200
    assert one.asked[0][1]["prompt"] == text


def test_keys(engines, proxy) -> None:
    (one,) = engines("D")
    served = proxy({one: "decode"}, api_key=SECRET)
    for header in ("", "Bearer", f"Basic {SECRET}", f"Bearer {SECRET}x", "Bearer \xff"):
        headers = {"authorization": header.encode("latin-1")}
        with httpx.Client(base_url=served.url, headers=headers) as client:
            assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 401
            assert client.get("/instances").status_code == 401
            assert client.get("/v1/models").status_code == 401
            assert client.get("/health").status_code == 200
            assert client.get("/metrics").status_code == 200
    assert not one.asked
    new = {"name": "E", "url": one.url}
    with served.client(SECRET) as client:
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200
        assert client.get("/instances").status_code == 200
        assert client.post("/instances", json=new).status_code == 401
        assert client.delete("/instances/D").status_code == 401
    with served.client(ADMIN) as admin:
        assert admin.post("/instances", json=new).status_code == 201


def test_without_an_admin_key_nobody_changes_instances(engines, proxy) -> None:
    (one,) = engines("D")
    served = proxy({one: "decode"}, admin_key=None)
    for key in (None, "None", ""):
        with served.client(key) as client:
            response = client.delete("/instances/D")
            assert response.status_code == 403
            assert "admin_key" in response.json()["error"]["message"]
    assert served.ask().status_code == 200


def test_tls(engines, proxy, tmp_path) -> None:
    (one,) = engines("D")
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    key, chain = tmp_path / "key.pem", tmp_path / "chain.pem"
    certificate.private_key_pem.write_to_path(str(key))
    for part in certificate.cert_chain_pems:
        part.write_to_path(str(chain), append=True)
    served = proxy({one: "decode"}, tls_certificate=chain, tls_key=key, limits={"header_s": 0.5})
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with httpx.Client(verify=context, base_url=f"https://localhost:{served.port}") as client:
        body = {"prompt": "x", "stream": True, "temperature": 0}
        assert client.post("/v1/completions", json=body).text.endswith("data: [DONE]\n\n")


def test_idle_streams_hold_up_nobody(engines, proxy, connect) -> None:
    (one, two) = engines("D1", "D2")
    one.gap_s = 60
    served = proxy({one: "decode"})
    with served.client() as client:
        for number in range(100):
            connection = connect(served)
            body = {"prompt": f"x{number}", "stream": True}
            connection.sendall(request(json.dumps(body).encode()))
            assert b"200" in connection.recv(1024)
        assert served.metric("ucm_proxy_running") == 100
        began = time.monotonic()
        with served.client(ADMIN) as admin:
            admin.post("/instances", json={"name": "D2", "url": two.url})
            admin.post("/instances/D1/drain")
        for number in range(10):
            assert client.post("/v1/completions", json={"prompt": f"y{number}"}).status_code == 200
        assert time.monotonic() - began < 10
