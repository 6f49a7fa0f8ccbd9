# SPDX-License-Identifier: MIT
from __future__ import annotations

from ucm_sdk.availability import Breaker


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_timeout_opens_at_once_and_lets_one_attempt_through_later() -> None:
    clock = Clock()
    breaker = Breaker(10, clock=clock)
    assert breaker.allows("transfer")
    breaker.timed_out("transfer")
    assert not breaker.closed
    assert not breaker.allows("transfer")
    clock.now = 10.0
    assert breaker.allows("transfer")
    assert not breaker.allows("transfer")
    breaker.succeeded("transfer")
    assert breaker.closed
    assert breaker.allows("transfer")


def test_three_failures_in_a_row_open() -> None:
    breaker = Breaker(10, clock=Clock())
    for _ in range(2):
        breaker.failed("transfer")
    breaker.succeeded("transfer")
    for _ in range(2):
        breaker.failed("transfer")
    assert breaker.closed
    breaker.failed("transfer")
    assert not breaker.closed


def test_a_lookup_that_works_does_not_say_that_loads_do() -> None:
    clock = Clock()
    breaker = Breaker(10, clock=clock)
    breaker.timed_out("transfer")
    clock.now = 10.0
    assert breaker.allows("transfer")
    breaker.succeeded("lookup")
    assert not breaker.closed
    breaker.succeeded("transfer")
    breaker.timed_out("lookup")
    breaker.succeeded("lookup")
    assert breaker.closed


def test_lookups_that_work_do_not_hide_loads_that_fail() -> None:
    breaker = Breaker(10, clock=Clock())
    for _ in range(3):
        breaker.succeeded("lookup")
        breaker.failed("transfer")
    assert not breaker.closed
