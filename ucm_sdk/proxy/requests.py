# SPDX-License-Identifier: MIT
"""What a client asks, as far as the proxy must understand it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

PATHS: Final = ("/v1/completions", "/v1/chat/completions")
_CHAT: Final = PATHS[1]
_ONLY_FOR_ANSWERS: Final = (
    "best_of",
    "echo",
    "logprobs",
    "min_tokens",
    "n",
    "prompt_logprobs",
    "response_format",
    "stream_options",
    "structured_outputs",
    "top_logprobs",
)
"""What changes an answer and not the prompt's KV."""


class ProxyError(Exception):
    """What a client is told instead of an answer."""

    def __init__(self, status: int, message: str, *, retry_after_s: int | None = None) -> None:
        """Answer with an HTTP status and a sentence."""
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


def no_instance() -> ProxyError:
    """Return what is said while no instance can answer."""
    return ProxyError(503, "no instance answers; ask later", retry_after_s=2)


def error_body(status: int, message: str) -> dict[str, Any]:
    """Return an error as OpenAI's clients expect it."""
    kind = "invalid_request_error" if status < 500 else "server_error"  # noqa: PLR2004 - HTTP's
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


@dataclass(frozen=True, slots=True)
class Ask:
    """A completion that a client asks for."""

    path: str
    body: bytes
    """As it came: what a decode instance gets."""
    values: dict[str, Any]
    """The same, parsed."""

    @classmethod
    def parse(cls, path: str, body: bytes) -> Ask:
        """Return the request; raises ``ProxyError`` for what no engine could serve."""
        try:
            values = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ProxyError(400, f"the body is not JSON: {error}") from error
        wanted = "messages" if path == _CHAT else "prompt"
        if not isinstance(values, dict) or not isinstance(values.get(wanted), str | list):
            raise ProxyError(400, f"the body must be an object with {wanted!r}")
        return cls(path, body, values)

    @property
    def stream(self) -> bool:
        """Whether the answer comes in events."""
        return bool(self.values.get("stream"))

    @property
    def model(self) -> str:
        """The model that is asked for."""
        return str(self.values.get("model", ""))

    @property
    def prompt(self) -> bytes:
        """What stands at the beginning of the engine's prompt, for comparisons."""
        if self.path == _CHAT:
            # Templates put tools before messages.
            parts = [self.values.get("tools"), self.values["messages"]]
            return json.dumps(parts, separators=(",", ":")).encode()
        prompt = self.values["prompt"]
        text = prompt if isinstance(prompt, str) else json.dumps(prompt, separators=(",", ":"))
        return text.encode(errors="surrogatepass")

    @property
    def repeatable(self) -> bool:
        """Whether another instance gives the same single answer, in text alone."""
        values = self.values
        prompt, n = values.get("prompt"), values.get("n")
        several = isinstance(prompt, list) and any(isinstance(one, str | list) for one in prompt)
        fixed = values.get("temperature") == 0 or values.get("seed") is not None
        plain = values.get("logprobs") is None or values.get("logprobs") is False
        return fixed and plain and not several and (n is None or n == 1)

    def prefill_body(self) -> bytes:
        """Return the body that makes an engine compute the prompt, and say what it has saved."""
        values = {k: v for k, v in self.values.items() if k not in _ONLY_FOR_ANSWERS}
        # vLLM's words for: somebody else will go on.
        values["kv_transfer_params"] = self._transfer_params(do_remote_decode=True)
        values["stream"] = False
        values["max_tokens"] = 1
        if "max_completion_tokens" in values:
            values["max_completion_tokens"] = 1
        return json.dumps(values).encode()

    def awaiting(self) -> Ask:
        """Return the request as one whose prompt somebody has just computed, and is saving."""
        params = self._transfer_params(do_remote_prefill=True)
        values = {**self.values, "kv_transfer_params": params}
        return Ask(self.path, json.dumps(values).encode(), values)

    def _transfer_params(self, **more: bool) -> dict[str, Any]:
        given = self.values.get("kv_transfer_params")
        return {**(given if isinstance(given, dict) else {}), **more}
