# SPDX-License-Identifier: MIT
"""First come, first served."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from ucm_sdk.proxy.turns import Queue


def test_the_first_to_whom_it_is_of_use_is_woken() -> None:
    async def run() -> list[str]:
        queue, woken = Queue(), []

        async def wait(name: str, *excluded: str) -> None:
            await queue.wait(excluded, timeout_s=5, first=False)
            woken.append(name)

        tasks = [asyncio.create_task(wait(*who)) for who in (("a", "x"), ("b",), ("c",))]
        await asyncio.sleep(0)
        for thing in ("x", "y", "x"):
            queue.freed(thing)
            await asyncio.sleep(0.01)
        queue.freed("nobody waits any more")
        await asyncio.gather(*tasks)
        assert not len(queue)
        return woken

    assert asyncio.run(run()) == ["b", "a", "c"]


def test_who_was_woken_in_vain_keeps_its_place() -> None:
    async def run() -> list[str]:
        queue, woken = Queue(), []

        async def wait(name: str, *, first: bool) -> None:
            await queue.wait((), timeout_s=5, first=first)
            woken.append(name)

        tasks = [asyncio.create_task(wait(*who)) for who in ()]
        for name, first in (("late", False), ("early", True)):
            tasks.append(asyncio.create_task(wait(name, first=first)))
            await asyncio.sleep(0)
        queue.freed("x")
        await asyncio.sleep(0.01)
        assert woken == ["early"]
        queue.changed()
        await asyncio.gather(*tasks)
        return woken

    assert asyncio.run(run()) == ["early", "late"]


@pytest.mark.parametrize("how", ["cancelled", "timed out"])
def test_who_goes_passes_on_what_was_meant_for_it(how: str) -> None:
    async def run() -> None:
        queue = Queue()
        patience = 0.05 if how == "timed out" else 5
        going = asyncio.create_task(queue.wait((), timeout_s=patience, first=False))
        staying = asyncio.create_task(queue.wait((), timeout_s=5, first=False))
        await asyncio.sleep(0)
        if how == "cancelled":
            queue.freed("x")
            going.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await going
        else:
            with pytest.raises(TimeoutError):
                await going
            assert len(queue) == 1
            queue.freed("x")
        await asyncio.wait_for(staying, 1)

    asyncio.run(run())
