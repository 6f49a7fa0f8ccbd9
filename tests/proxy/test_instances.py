# SPDX-License-Identifier: MIT
"""Instances that come, go, are full or unwell, and who is sent to them."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from proxy_harness import ADMIN, eventually, right, text_of


def test_more_than_may_wait_are_refused(engines, proxy) -> None:
    (one,) = engines("D")
    limits = {"running": 2, "waiting": 3, "queue_s": 10}
    served = proxy({one: "decode"}, limits=limits)
    one.delay_s = 0.5
    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(served.ask, f"{number}", stream=True) for number in range(12)]
        statuses = sorted(one.result().status_code for one in asked)
    assert statuses == [200] * 5 + [503] * 7


def test_a_turn_that_does_not_come(engines, proxy) -> None:
    (one,) = engines("D")
    instance = {"name": "D", "url": one.url, "max_running": 1}
    one.delay_s = 1.5
    for limits in ({"running": 1, "queue_s": 0.3}, {"queue_s": 0.3}):
        served = proxy(instances=[instance], limits=limits)
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(served.ask, f"{number}") for number in range(3)]
            responses = [one.result() for one in asked]
        statuses = sorted(response.status_code for response in responses)
        assert statuses == [200, 503, 503]
        late = next(response for response in responses if response.status_code == 503)
        assert late.headers["retry-after"] == "1"


def test_an_instance_has_no_more_than_it_may(engines, proxy) -> None:
    (one,) = engines("D")
    served = proxy(instances=[{"name": "D", "url": one.url, "max_running": 2}])
    one.delay_s = 0.1
    most = 0
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(served.ask, f"{number}") for number in range(8)]
        while not all(one.done() for one in asked):
            most = max(most, len(one.asked) - one.ended)
            time.sleep(0.005)
        assert all(one.result().status_code == 200 for one in asked)
    assert most == 2


def test_instances_come_and_go(engines, proxy) -> None:
    one, two = engines("D1", "D2")
    served = proxy()
    assert served.ask().status_code == 503
    with served.client(ADMIN) as admin:
        added = admin.post("/instances", json={"name": "D1", "url": one.url})
        assert added.status_code == 201
        assert added.json()["healthy"]
        assert text_of(served.ask("x")) == right("x")
        assert admin.post("/instances", json={"name": "D1", "url": two.url}).status_code == 409
        bad = admin.post("/instances", json={"name": "D3", "url": "ftp://nowhere"})
        assert bad.status_code == 400
        assert "url" in bad.json()["error"]["message"]
        assert admin.post("/instances", content=b"[1]").status_code == 400
        for wrong in (
            {"url": "http://h:abc"},
            {"url": "http://[::1"},
            {"url": "http://h", "api_key": "é"},
            {"url": one.url, "health_path": "/h\0"},
        ):
            assert admin.post("/instances", json={"name": "D3", **wrong}).status_code == 400
        assert admin.post("/instances", json={"name": "D3", "url": one.url}).status_code == 201
        assert admin.delete("/instances/D3").status_code == 204
        admin.post("/instances", json={"name": "D2", "url": two.url})
        assert admin.post("/instances/D1/drain").json()["draining"]
        for number in range(4):
            served.ask(f"{number}")
        assert len(two.asked) == 4
        assert not admin.delete("/instances/D1/drain").json()["draining"]
        assert admin.delete("/instances/D2").status_code == 204
        assert admin.delete("/instances/D2").status_code == 404
        served.ask("y")
        assert len(one.asked) == 2
        shown = admin.get("/instances").json()
    assert [(row["name"], row["role"], row["healthy"]) for row in shown] == [("D1", "both", True)]


def test_what_an_instance_does_goes_on_when_it_is_removed(engines, proxy) -> None:
    (one,) = engines("D")
    served = proxy({one: "decode"})
    one.gap_s = 0.1
    with ThreadPoolExecutor(2) as pool, served.client(ADMIN) as admin:
        asked = pool.submit(served.ask, "x", stream=True, max_tokens=20)
        short = pool.submit(served.ask, "x", stream=True, max_tokens=8)
        eventually(lambda: len(one.asked) == 2)
        assert admin.delete("/instances/D").status_code == 204
        assert served.ask().status_code == 503
        # Another one of its name is counted by itself.
        admin.post("/instances", json={"name": "D", "url": one.url, "role": "decode"})
        assert text_of(short.result()) == right("x")
        eventually(lambda: served.metric("ucm_proxy_running") == 1)
        assert served.metric("ucm_proxy_instance_running", instance="D", role="decode") == 0
        assert text_of(asked.result()) == right("x", 20)
    eventually(lambda: not served.metric("ucm_proxy_running"))
    assert served.metric("ucm_proxy_instance_running", instance="D", role="decode") == 0


def test_an_unhealthy_instance_gets_nothing_until_it_is_well(engines, proxy) -> None:
    one, two = engines("D1", "D2")
    served = proxy({one: "decode", two: "decode"}, routing={"policy": "load"})
    one.health = 503
    eventually(
        lambda: not served.metric("ucm_proxy_instance_healthy", instance="D1", role="decode")
    )
    for number in range(4):
        served.ask(f"{number}")
    assert not one.asked
    one.health = 200
    eventually(lambda: served.metric("ucm_proxy_instance_healthy", instance="D1", role="decode"))
    for number in range(4):
        served.ask(f"{number}")
    assert one.asked


def test_a_prompt_goes_where_its_beginning_is_known(engines, proxy) -> None:
    one, two = engines("D1", "D2")
    served = proxy({one: "decode", two: "decode"}, routing={"piece_bytes": 16})
    for turn in range(3):
        for name in ("first", "second"):
            served.ask(f"{name} document " * 10 + f"question {turn}")
    for engine in (one, two):
        assert len({body["prompt"][:14] for _, body, _ in engine.asked}) == 1
        assert len(engine.asked) == 3


def test_models_are_an_instances(engines, proxy) -> None:
    (one,) = engines("D")
    with proxy({one: "decode"}).client() as client:
        assert client.get("/v1/models").json() == {"data": [{"id": "D"}]}
        assert client.get("/health").status_code == 200
        assert client.get("/nothing").status_code == 404
        assert client.get("/v1/completions").status_code == 405
