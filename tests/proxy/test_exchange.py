# SPDX-License-Identifier: MIT
"""Requests through a proxy, and instances that fail."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from proxy_harness import eventually, right, text_of
from ucm_sdk.handoff import SavedBlocks


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_are_computed_by_one_and_answered_by_another(engines, proxy, stream: bool) -> None:
    one, other = engines("P", "D")
    served = proxy({one: "prefill", other: "decode"})
    asked = {"max_tokens": 8, "stream": stream, "logprobs": None, "n": 1, "min_tokens": 3}
    response = served.ask("what is it", **asked, kv_transfer_params={"chunks": [[0, 2]]})
    assert response.status_code == 200
    assert text_of(response) == right("what is it")
    ((path, body, headers),) = one.asked
    assert path == "/v1/completions"
    assert headers["content-type"] == "application/json"
    assert body["max_tokens"] == 1
    assert body["stream"] is False
    assert body["prompt"] == "what is it"
    assert body["kv_transfer_params"] == {"chunks": [[0, 2]], "do_remote_decode": True}
    assert not {"min_tokens", "n", "logprobs"} & body.keys()
    ((_, body, _),) = other.asked
    assert body["max_tokens"] == 8
    # The one that prefills has named no blocks, so the other waits for them.
    assert body["kv_transfer_params"] == {"chunks": [[0, 2]], "do_remote_prefill": True}
    assert served.metric("ucm_proxy_attempts_total", result="ok", stage="prefill") == 1
    assert served.metric("ucm_proxy_readiness_total", result="unknown") == 1
    assert served.metric("ucm_proxy_requests_total", result="answered") == 1


def test_blocks_that_were_named_and_are_there_are_not_waited_for(engines, proxy, tmp_path) -> None:
    one, other = engines("P", "D")
    one.params = SavedBlocks(bytes(32), "{}", ()).to_params()
    store = {"kind": "file", "directory": str(tmp_path)}
    served = proxy({one: "prefill", other: "decode"}, store)
    served.ask("what is it")
    assert served.metric("ucm_proxy_readiness_total", result="ready") == 1
    assert "kv_transfer_params" not in other.asked[0][1]


@pytest.mark.parametrize("stream", [False, True])
def test_chat(engines, proxy, stream: bool) -> None:
    one, other = engines("P", "D")
    served = proxy({one: "prefill", other: "decode"})
    messages = [{"role": "user", "content": "tell me more"}]
    body = {"messages": messages, "max_completion_tokens": 5, "stream": stream, "temperature": 0}
    with served.client() as client:
        response = client.post("/v1/chat/completions", json=body)
    assert text_of(response) == right("tell me more", 5)
    assert one.asked[0][1]["max_completion_tokens"] == 1
    assert one.asked[0][1]["max_tokens"] == 1


def test_short_prompts_need_no_prefill(engines, proxy) -> None:
    one, other = engines("P", "D")
    served = proxy({one: "prefill", other: "decode"}, routing={"min_prefill_bytes": 20})
    served.ask("short")
    assert not one.asked
    served.ask("a prompt that is not so short")
    assert len(one.asked) == 1
    assert len(other.asked) == 2
    assert "kv_transfer_params" not in other.asked[0][1]


def test_an_instance_gets_its_own_key_and_not_the_clients(engines, proxy) -> None:
    (one,) = engines("D")
    instance = {"name": "D", "url": one.url, "api_key": "engine's"}
    served = proxy(instances=[instance], api_key="client's")
    assert served.ask().status_code == 401
    with served.client("client's") as client:
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200
    assert one.asked[0][2]["authorization"] == "Bearer engine's"


def test_a_failing_prefill_is_made_up_for(engines, proxy) -> None:
    one, two, other = engines("P1", "P2", "D")
    served = proxy({one: "prefill", two: "prefill", other: "decode"})
    one.status = 500
    for number in range(4):
        assert text_of(served.ask(f"prompt {number}")) == right(f"prompt {number}")
    # Tried again elsewhere, and computed by the decode instance where nobody is left.
    assert len(two.asked) == 4
    two.status = 503
    assert text_of(served.ask("the last")) == right("the last")
    one.die()
    two.die()
    assert text_of(served.ask("really")) == right("really")
    assert len(other.asked) == 6


def test_a_prompt_that_prefill_refuses_is_refused_by_who_decodes(engines, proxy) -> None:
    one, other = engines("P", "D")
    one.status = other.status = 400
    response = proxy({one: "prefill", other: "decode"}).ask()
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "D says no"
    assert len(one.asked) == len(other.asked) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_decode_that_has_no_room_or_fails_is_tried_elsewhere(
    engines, proxy, stream: bool, status: int
) -> None:
    one, two = engines("D1", "D2")
    served = proxy({one: "decode", two: "both"}, routing={"policy": "round_robin"})
    one.status = status
    for number in range(3):
        assert text_of(served.ask(f"{number}", stream=stream)) == right(f"{number}")
    two.status = status
    response = served.ask(stream=stream)
    # What the last one said, as it said it.
    assert response.status_code == status
    assert "says no" in response.json()["error"]["message"]
    assert response.headers["retry-after"] == "7"


def test_nobody_answers(engines, proxy) -> None:
    (one,) = engines("D")
    served = proxy({one: "decode"})
    one.die()
    # Whether it is this request or a health check that finds out first.
    assert served.ask().status_code in {502, 503}
    eventually(lambda: served.ask().status_code == 503)
    response = served.ask()
    assert response.headers["retry-after"] == "2"
    assert "no instance answers" in response.json()["error"]["message"]
    with served.client() as client:
        assert client.get("/health").status_code == 503
        assert client.get("/v1/models").status_code == 503


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("after", [0, 1, 5, 7])
def test_a_stream_goes_on_with_another_instance(engines, proxy, after: int, chat: bool) -> None:
    one, two = engines("D1", "D2")
    served = proxy({one: "decode", two: "decode"}, routing={"policy": "round_robin"})
    one.break_after = after
    prompt = {"messages": [{"role": "user", "content": "go on"}]} if chat else {"prompt": "go on"}
    body = {**prompt, "max_tokens": 8, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    with served.client() as client:
        path = "/v1/chat/completions" if chat else "/v1/completions"
        response = client.post(path, json=body)
    assert text_of(response) == right("go on")
    values = [json.loads(x[6:]) for x in response.text.splitlines() if x.startswith("data: {")]
    # For the client it is one stream.
    assert len({(value["id"], value["created"]) for value in values}) == 1
    assert values[-1]["usage"] == {"completion_tokens": 8}
    assert [v["choices"][0].get("finish_reason") for v in values[:-1]][-1] == "length"
    assert sum(v["choices"][0].get("finish_reason") == "length" for v in values[:-1]) == 1
    assert len(two.asked) == 1
    eventually(lambda: served.metric("ucm_proxy_requests_total", result="answered") == 1)
    assert served.metric("ucm_proxy_replayed_total") == (1 if after or chat else 0)


@pytest.mark.parametrize("after", [0, 4])
def test_an_error_in_a_stream_is_not_passed_on(engines, proxy, after: int) -> None:
    one, two = engines("D1", "D2")
    served = proxy({one: "decode", two: "decode"}, routing={"policy": "round_robin"})
    one.error_after = after
    assert text_of(served.ask("go on", stream=True)) == right("go on")
    assert len(one.asked) == len(two.asked) == 1


def test_a_broken_stream_that_nobody_has_room_for_ends_with_an_error(engines, proxy) -> None:
    one, two = engines("D1", "D2")
    instances = [{"name": e.name, "url": e.url, "max_running": 1} for e in (one, two)]
    served = proxy(instances=instances, routing={"policy": "round_robin"}, limits={"queue_s": 0.3})
    one.break_after, one.gap_s, two.delay_s = 5, 0.1, 3
    with ThreadPoolExecutor(2) as pool:
        breaking = pool.submit(served.ask, "go on", stream=True)
        eventually(lambda: one.asked)
        busy = pool.submit(served.ask, "something else")
        response = breaking.result()
        assert "as many requests as it may" in response.text
        assert "[DONE]" not in response.text
        busy.result()
    assert served.metric("ucm_proxy_requests_total", result="broken") == 1


def test_nothing_is_computed_for_nobody(engines, proxy) -> None:
    one, other = engines("P", "D")
    served = proxy({one: "prefill", other: "decode"})
    other.die()
    eventually(lambda: served.ask().status_code == 503)
    asked = len(one.asked)
    assert served.ask().status_code == 503
    assert len(one.asked) == asked


def test_a_whole_answer_that_takes_too_long_is_not_asked_for_again(engines, proxy) -> None:
    one, two, first = engines("D1", "D2", "P")
    roles = {one: "decode", two: "decode", first: "prefill"}
    served = proxy(roles, engines={"idle_s": 0.5})
    one.delay_s = two.delay_s = 2
    # That limit is not one of prefill.
    first.delay_s = 1
    assert served.ask().status_code == 504
    assert len(one.asked) + len(two.asked) == 1
    assert served.metric("ucm_proxy_attempts_total", result="ok", stage="prefill") == 1


def test_a_long_prefill_takes_nothing_from_the_patience_with_decode(engines, proxy) -> None:
    one, other = engines("P", "D")
    instances = [
        {"name": "P", "url": one.url, "role": "prefill"},
        {"name": "D", "url": other.url, "role": "decode", "max_running": 1},
    ]
    served = proxy(instances=instances, limits={"queue_s": 1})
    one.delay_s, other.delay_s = 1.2, 0.7
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(served.ask, f"{number}") for number in range(2)]
        assert [one.result().status_code for one in asked] == [200, 200]


def test_connections_of_streams_are_used_again(engines, proxy) -> None:
    (one,) = engines("D")
    served = proxy({one: "decode"})
    one.end_s = 0.05
    for number in range(10):
        served.ask(f"{number}", stream=True)
        eventually(lambda: not served.metric("ucm_proxy_running"))
    assert len(one.ports) == 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"temperature": 1}, "cannot be repeated"),
        ({"n": 2}, "cannot be repeated"),
        ({"prompt": ["x", "y"]}, "cannot be repeated"),
    ],
)
def test_what_cannot_be_repeated_ends_with_an_error(engines, proxy, change, why: str) -> None:
    one, two = engines("D1", "D2")
    served = proxy({one: "decode", two: "decode"}, routing={"policy": "round_robin"})
    one.break_after = 3
    response = served.ask(**{"prompt": "go on", **change}, stream=True)
    last = json.loads(response.text.strip().splitlines()[-1][6:])
    assert why in last["error"]["message"]
    assert not two.asked
    assert served.metric("ucm_proxy_requests_total", result="broken") == 1


def test_another_answer_is_an_error_and_not_a_mixture(engines, proxy) -> None:
    one, two = engines("D1", "D2")
    served = proxy({one: "decode", two: "decode"}, routing={"policy": "round_robin"})
    one.break_after, two.other_answer = 3, True
    response = served.ask("go on", stream=True)
    *events, last = response.text.strip().splitlines()
    assert "another instance gave another answer" in json.loads(last[6:])["error"]["message"]
    got = "".join(json.loads(x[6:])["choices"][0]["text"] for x in events if x)
    assert got == right("go on", 8)[: len(got)]


def test_a_long_stream_is_not_remembered_for_ever(engines, proxy) -> None:
    one, two = engines("D1", "D2")
    values = {"replay_bytes": 100}
    served = proxy({one: "decode", two: "decode"}, engines=values, routing={"policy": "load"})
    one.break_after = two.break_after = 5
    response = served.ask("go on", stream=True)
    assert "cannot be repeated" in response.text
    assert len(one.asked) + len(two.asked) == 1


def test_fifty_streams_survive_the_death_of_an_instance(engines, proxy) -> None:
    one, two, first = engines("D1", "D2", "P")
    served = proxy({one: "decode", two: "decode", first: "prefill"})
    one.gap_s = two.gap_s = 0.02
    with ThreadPoolExecutor(50) as pool:
        prompts = [f"question {number}" for number in range(50)]
        asked = [pool.submit(served.ask, prompt, stream=True, max_tokens=20) for prompt in prompts]
        eventually(lambda: len(one.asked) > 10)
        time.sleep(0.1)
        one.die()
        for prompt, response in zip(prompts, asked, strict=True):
            assert text_of(response.result()) == right(prompt, 20)
    eventually(lambda: served.metric("ucm_proxy_requests_total", result="answered") == 50)
    assert served.metric("ucm_proxy_replayed_total") > 0


@pytest.mark.parametrize("stream", [False, True])
def test_an_instance_gives_up_what_a_client_gives_up(engines, proxy, stream: bool) -> None:
    (one,) = engines("D")
    served = proxy({one: "decode"})
    one.delay_s, one.gap_s = (0, 2) if stream else (5, 0)
    body = {"prompt": "x", "stream": stream, "max_tokens": 100}
    with served.client() as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json=body, timeout=0.5)
    eventually(lambda: one.abandoned == 1)
    eventually(lambda: served.metric("ucm_proxy_requests_total", result="cancelled") == 1)
    assert served.metric("ucm_proxy_running") == 0
    assert served.metric("ucm_proxy_instance_running", instance="D", role="decode") == 0


def test_a_connection_that_an_engine_may_be_about_to_close_is_not_used_again(
    engines, proxy
) -> None:
    (one,) = engines("D")
    served = proxy({one: "decode"})
    served.ask("first")
    time.sleep(2.5)
    served.ask("second")
    assert len(one.ports) == 2
