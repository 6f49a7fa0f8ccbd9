# SPDX-License-Identifier: MIT
"""Streams that are cut anywhere and gone on with."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm_sdk.proxy.streams import EventStream, StreamError, UnrepeatableError


def event(text: str, finish: str | None = None, name: str = "one", *, chat: bool = False) -> bytes:
    place: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
    choice = {"index": 0, **place, "finish_reason": finish}
    return b"data: " + json.dumps({"id": name, "choices": [choice]}).encode() + b"\n\n"


def stream(pieces: list[str], name: str, *, chat: bool = False) -> bytes:
    parts = [event(piece, None, name, chat=chat) for piece in pieces]
    usage = {"id": name, "choices": [], "usage": {"completion_tokens": len(pieces)}}
    ends = [event("", "stop", name, chat=chat), b"data: " + json.dumps(usage).encode() + b"\n\n"]
    return b"".join([*parts, *ends, b"data: [DONE]\n\n"])


def text_of(data: bytes) -> tuple[str, list[str], set[str]]:
    """Return the text, why it ended, and the names of the events."""
    text, finishes, names = "", [], set()
    for part in data.split(b"\n\n"):
        if part.startswith(b"data: {"):
            value = json.loads(part[6:])
            names.add(value["id"])
            for choice in value["choices"]:
                text += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
                finishes += [choice["finish_reason"]] if choice.get("finish_reason") else []
    return text, finishes, names


@given(st.data(), st.text(max_size=30), st.booleans())
def test_whatever_is_cut_wherever(data: st.DataObject, text: str, chat: bool) -> None:
    def cut(value, most: int) -> list:
        edges = sorted(data.draw(st.lists(st.integers(0, len(value)), max_size=most)))
        edges = [0, *edges, len(value)]
        return [value[a:b] for a, b in itertools.pairwise(edges)]

    passed, out = EventStream(1 << 20, repeatable=True), b""
    for number in range(data.draw(st.integers(0, 3))):
        sent = stream(cut(text, 5), f"stream {number}", chat=chat)
        # It breaks before its end, in the middle of an event or not.
        for part in cut(sent[: data.draw(st.integers(0, len(sent) - 15))], 5):
            out += passed.feed(part)
        assert not passed.done
        passed.begin_again()
    for part in cut(stream(cut(text, 5), "the last", chat=chat), 8):
        out += passed.feed(part)
    assert passed.done
    found, finishes, names = text_of(out)
    assert found == text
    assert finishes == ["stop"]
    assert len(names) == 1
    assert out.endswith(b"data: [DONE]\n\n")
    assert out.count(b"usage") == 1


def broken(*events: bytes, repeatable: bool = True) -> EventStream:
    passed = EventStream(1 << 20, repeatable=repeatable)
    passed.feed(b"".join(events))
    return passed


@pytest.mark.parametrize(
    "sent",
    [
        b'data: {"choices": [{"index": 0, "delta": {"tool_calls": [{"id": 1}]}}]}\n\n',
        b'data: {"choices": [{"index": 0, "text": "x", "logprobs": {"tokens": ["x"]}}]}\n\n',
        b'data: {"choices": [{"index": 1, "text": "x"}]}\n\n',
        b'data: {"choices": [{"index": 0, "text": "x", "token_ids": [1]}]}\n\n',
        b'data: {"choices": [{"index": 0, "text": "x"}, {"index": 1, "text": "y"}]}\n\n',
        b'data: {"error": {"message": "out of memory"}}\n\n',
        b"data: {not JSON\n\n",
        b"data: 3\n\n",
    ],
)
def test_what_cannot_be_compared_is_not_gone_on_with(sent: bytes) -> None:
    with pytest.raises(StreamError):
        broken(sent).begin_again()  # or when it is passed on
    passed = broken(event("a"))
    passed.begin_again()
    with pytest.raises(StreamError):
        passed.feed(event("a") + sent)


def test_another_text_or_a_shorter_one() -> None:
    shorter = event("a") + b"data: [DONE]\n\n"
    for other in (event("ax"), event("b"), event("a", "stop"), shorter):
        passed = broken(event("a"), event("b"))
        passed.begin_again()
        with pytest.raises(UnrepeatableError, match="another answer"):
            passed.feed(other + event("b", "stop"))
    for other in (event("ab", "stop"), event("a", "length")):
        passed = broken(event("a", "stop"))
        passed.begin_again()
        with pytest.raises(UnrepeatableError, match="another answer"):
            passed.feed(other)


def test_not_repeatable() -> None:
    passed = broken(event("a"), repeatable=False)
    with pytest.raises(UnrepeatableError, match="cannot be repeated"):
        passed.begin_again()


def test_what_the_client_has_nothing_of_may_begin_anew() -> None:
    passed = broken(event("half")[:20], repeatable=False)
    passed.begin_again()
    assert text_of(passed.feed(event("whole")))[0] == "whole"


@pytest.mark.parametrize("error", [{"error": {"message": "dead"}}, {"object": "error"}])
def test_an_error_in_the_stream_is_not_an_answer(error: dict[str, Any]) -> None:
    passed = broken(event("a"), event("an error that is only text"))
    with pytest.raises(StreamError, match="gave up"):
        passed.feed(b"data: " + json.dumps(error).encode() + b"\n\ndata: [DONE]\n\n")
    assert not passed.done


def test_lines_of_other_systems() -> None:
    passed, out = EventStream(100, repeatable=True), b""
    data = event("a").replace(b"\n", b"\r\n") + b"data:[DONE]\r\n\r\n"
    for first in range(len(data)):
        out += passed.feed(data[first : first + 1])
    assert text_of(out)[0] == "a"
    assert passed.done


def test_what_is_said_once_is_said_once() -> None:
    role = b'data: {"id": "2", "choices": [{"index": 0, "delta": {"role": "assistant"}}]}\n\n'
    usage = b'data: {"id": "1", "choices": [], "usage": {"completion_tokens": 1}}\n\n'
    passed = broken(b": still there\n\n")
    passed.begin_again()
    assert b"assistant" in passed.feed(role)
    assert passed.feed(event("a", chat=True))
    passed = broken(role, event("a", "stop", chat=True), usage)
    passed.begin_again()
    again = passed.feed(role + event("a", "stop", chat=True) + usage + b"data: [DONE]\n\n")
    assert again == b"data: [DONE]\n\n"


def test_comments_are_passed_on() -> None:
    passed = broken(b": still there\n\n", event("a"))
    passed.begin_again()
    assert passed.feed(b": still there\n\n") == b": still there\n\n"
    assert passed.feed(event("a")) == b""
    assert text_of(passed.feed(event("b")))[0] == "b"


def test_events_without_end() -> None:
    passed = EventStream(1 << 20, repeatable=True)
    with pytest.raises(StreamError, match="an event of more than"):
        for _ in range(1000):
            passed.feed(b"a" * (1 << 16))
