# SPDX-License-Identifier: MIT
"""A stream of events that may be gone on with from another instance.

Events are passed on as they come, whole.  When an instance fails in the middle, another is asked
the same from the beginning, and what the client has already is left out: it must be the same text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

_END: Final = b"\n\n"
_DONE: Final = b"data: [DONE]"
_MOST_EVENT_BYTES: Final = 8 << 20


class StreamError(Exception):
    """An instance sent what cannot be passed on."""


class EventStream:
    """What one client has been sent."""

    def __init__(self, replay_bytes: int, *, repeatable: bool) -> None:
        """Remember up to ``replay_bytes``, where the answer can be repeated at all."""
        self._most = replay_bytes
        self._sent: list[bytes] = []
        self._sent_bytes = 0
        self._repeatable = repeatable
        self._partial = b""
        self._skip: _Skip | None = None
        self.done = False
        """Whether the last event has been passed on."""

    @property
    def can_repeat(self) -> bool:
        """Whether another instance can go on."""
        return self._repeatable and self._sent_bytes <= self._most

    def feed(self, data: bytes) -> bytes:
        """Return what the client is to be sent for what an instance has sent."""
        whole, separator, self._partial = (self._partial + data).rpartition(_END)
        if len(self._partial) > _MOST_EVENT_BYTES:
            msg = f"an event of more than {_MOST_EVENT_BYTES} bytes"
            raise StreamError(msg)
        events = whole + separator
        if self._skip is not None:
            events = b"".join(self._skip.pass_on(event) for event in _events(events))
            if self._skip.ended:
                self._skip = None
        if events:
            self.done = events.rstrip().endswith(_DONE)
            self._sent_bytes += len(events)
            if self._repeatable and self._sent_bytes <= self._most:
                self._sent.append(events)
        return events

    def begin_again(self) -> None:
        """Expect the same stream from its beginning; raises ``StreamError`` if that cannot be."""
        if not self.can_repeat:
            msg = "the answer cannot be repeated"
            raise StreamError(msg)
        self._partial = b""
        if self._sent:
            self._skip = _Skip(b"".join(self._sent))


class _Skip:
    """Leaves out what was sent, and gives the rest the name of the first stream."""

    def __init__(self, sent: bytes) -> None:
        self.ended = False
        self._text, self._finished = "", False
        self._names: dict[str, Any] = {}
        for event in _events(sent):
            value = _parse(event)
            if value is None:
                continue
            self._names = self._names or {k: value[k] for k in ("id", "created") if k in value}
            text, finish = _content(value)
            self._text += text
            self._finished |= finish is not None
        self._seen = ""

    def pass_on(self, event: bytes) -> bytes:
        value = _parse(event)
        if value is None:
            return event
        value.update(self._names)
        text, finish = _content(value)
        before, self._seen = self._seen, self._seen + text
        common = min(len(self._seen), len(self._text))
        if self._seen[:common] != self._text[:common] or (
            finish is not None and len(self._seen) < len(self._text)
        ):
            msg = "another instance gave another answer"
            raise StreamError(msg)
        if self._finished and value.get("choices"):
            return b""
        if value.get("choices"):
            new = self._seen[max(len(before), len(self._text)) :]
            if not new and finish is None:
                return b""
            _set_content(value, new)
        return b"data: " + json.dumps(value).encode() + _END


def _events(data: bytes) -> Iterator[bytes]:
    for event in data.split(_END):
        if event:
            yield event + _END


def _parse(event: bytes) -> dict[str, Any] | None:
    """Return an event's value; None for comments and for the end."""
    text = event.strip()
    if not text.startswith(b"data:") or text == _DONE:
        return None
    try:
        value = json.loads(text[len(b"data:") :])
    except ValueError as error:
        msg = f"an event that is not JSON: {error}"
        raise StreamError(msg) from error
    if not isinstance(value, dict):
        msg = "an event that is not an object"
        raise StreamError(msg)
    if "error" in value:
        msg = f"the instance gave up: {value['error']}"
        raise StreamError(msg)
    return value


def _content(value: dict[str, Any]) -> tuple[str, str | None]:
    """Return a single choice's new text and why it ended; anything else cannot be compared."""
    choices = value.get("choices") or []
    if not choices:
        return "", None
    if len(choices) > 1 or choices[0].get("index", 0):
        msg = "several choices cannot be repeated"
        raise StreamError(msg)
    choice = choices[0]
    delta = choice.get("delta")
    if delta is not None:
        others = {k for k, v in delta.items() if v and k not in {"role", "content"}}
        if others:
            msg = f"{', '.join(sorted(others))} cannot be repeated"
            raise StreamError(msg)
        text = delta.get("content")
    else:
        text = choice.get("text")
    if choice.get("logprobs"):
        msg = "log probabilities cannot be repeated"
        raise StreamError(msg)
    return text or "", choice.get("finish_reason")


def _set_content(value: dict[str, Any], text: str) -> None:
    choice = value["choices"][0]
    if choice.get("delta") is not None:
        choice["delta"] = {"content": text}
    else:
        choice["text"] = text
