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
_DONE: Final = b"[DONE]"
"""Events of JSON end with a brace."""
_CHOICE: Final = frozenset(
    {"index", "text", "delta", "finish_reason", "stop_reason", "matched_stop"}
)
_DELTA: Final = frozenset({"role", "content"})
_MOST_EVENT_BYTES: Final = 8 << 20


class StreamError(Exception):
    """An instance sent what cannot be passed on."""


class UnrepeatableError(StreamError):
    """Another instance cannot go on, through no fault of its own."""


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

    def feed(self, data: bytes) -> bytes:
        """Return what the client is to be sent for what an instance has sent.

        Raises ``StreamError`` where that cannot be passed on, an error that the instance reports
        included.
        """
        data = self._partial + data
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        whole, separator, self._partial = data.rpartition(_END)
        if len(self._partial) > _MOST_EVENT_BYTES:
            msg = f"an event of more than {_MOST_EVENT_BYTES} bytes"
            raise StreamError(msg)
        events = whole + separator
        if self._skip is not None:
            events = b"".join(self._skip.pass_on(event) for event in _events(events))
        elif b"error" in events:
            for event in _events(events):
                _parse(event)
        if events:
            self.done = events.rstrip().endswith(_DONE)
            self._sent_bytes += len(events)
            if self._repeatable and self._sent_bytes <= self._most:
                self._sent.append(events)
        return events

    def begin_again(self) -> None:
        """Expect the same stream from its beginning.

        Raises ``UnrepeatableError`` where the client has some of it that cannot be repeated.
        """
        self._partial, self._skip = b"", None
        if not self._sent_bytes:
            return
        if not self._repeatable or self._sent_bytes > self._most:
            msg = "the answer cannot be repeated"
            raise UnrepeatableError(msg)
        self._skip = _Skip(b"".join(self._sent))


class _Skip:
    """Leaves out what was sent, and gives the rest the name of the first stream."""

    def __init__(self, sent: bytes) -> None:
        self._text = self._seen = ""
        self._finish: str | None = None
        self._role = self._usage = False
        self._names: dict[str, Any] = {}
        for event in _events(sent):
            value = _parse(event)
            if value is None:
                continue
            self._names = self._names or {k: value[k] for k in ("id", "created") if k in value}
            text, finish = _content(value)
            self._text += text
            self._finish = self._finish or finish
            self._role |= _has_role(value)
            self._usage |= not value.get("choices") and bool(value.get("usage"))

    def pass_on(self, event: bytes) -> bytes:
        value = _parse(event)
        if value is None:
            if event.strip().endswith(_DONE) and len(self._seen) < len(self._text):
                raise _another_answer()
            return event
        value.update(self._names)
        if not value.get("choices"):
            # What it has cost is said once.
            return b"" if self._usage and value.get("usage") else _event(value)
        text, finish = _content(value)
        before, self._seen = self._seen, self._seen + text
        common = min(len(self._seen), len(self._text))
        if self._seen[:common] != self._text[:common]:
            raise _another_answer()
        if finish is not None and len(self._seen) < len(self._text):
            raise _another_answer()
        if self._finish is not None:
            if len(self._seen) > len(self._text) or finish not in {None, self._finish}:
                raise _another_answer()
            return b""
        new = self._seen[max(len(before), len(self._text)) :]
        role = _has_role(value) and not self._role
        if not new and finish is None and not role:
            return b""
        _set_content(value, new, role=role)
        self._role |= role
        return _event(value)


def _another_answer() -> UnrepeatableError:
    return UnrepeatableError("another instance gave another answer")


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + _END


def _events(data: bytes) -> Iterator[bytes]:
    for event in data.split(_END):
        if event:
            yield event + _END


def _parse(event: bytes) -> dict[str, Any] | None:
    """Return an event's value; None for comments and for the end."""
    text = event.strip()
    if not text.startswith(b"data:") or text.endswith(_DONE):
        return None
    try:
        value = json.loads(text[len(b"data:") :])
    except ValueError as error:
        msg = f"an event that is not JSON: {error}"
        raise StreamError(msg) from error
    if not isinstance(value, dict):
        msg = "an event that is not an object"
        raise StreamError(msg)
    if value.get("error") or value.get("object") == "error":
        msg = f"the instance gave up: {value.get('error') or value.get('message')}"
        raise StreamError(msg)
    return value


def _content(value: dict[str, Any]) -> tuple[str, str | None]:
    """Return a single choice's new text and why it ended; anything else cannot be compared."""
    choices = value.get("choices") or []
    if not choices:
        return "", None
    if len(choices) > 1 or choices[0].get("index", 0):
        msg = "several choices cannot be repeated"
        raise UnrepeatableError(msg)
    choice = choices[0]
    delta = choice.get("delta")
    others = {k for k, v in choice.items() if v and k not in _CHOICE}
    others |= {k for k, v in (delta or {}).items() if v and k not in _DELTA}
    if others:
        msg = f"{', '.join(sorted(others))} cannot be repeated"
        raise UnrepeatableError(msg)
    text = choice.get("text") if delta is None else delta.get("content")
    return text or "", choice.get("finish_reason")


def _has_role(value: dict[str, Any]) -> bool:
    choices = value.get("choices") or []
    return any((choice.get("delta") or {}).get("role") for choice in choices)


def _set_content(value: dict[str, Any], text: str, *, role: bool) -> None:
    choice = value["choices"][0]
    if choice.get("delta") is None:
        choice["text"] = text
    else:
        choice["delta"] = {"content": text} | ({"role": choice["delta"]["role"]} if role else {})
