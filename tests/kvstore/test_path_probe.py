"""Probes of the path to the KV nodes: that they stay rare, and that what fails is told of."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence

import pytest
from kvasir_kvstore import path_probe
from kvasir_kvstore.index import Location
from kvasir_kvstore.nodes import NodeSet
from kvasir_kvstore.path_probe import Done, PathProbe
from kvasir_kvstore.peers import DataPlane
from kvstore_builders import make_pool

NAMES = [bytes(16)]


@contextlib.asynccontextmanager
async def make_probe() -> AsyncIterator[PathProbe]:
    probe = PathProbe(make_pool(), DataPlane(), NodeSet(["127.0.0.1:1"]))
    yield probe
    await probe.close()


class Empty:
    """Finds nothing, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.num_asked = 0

    async def __call__(self, names: Sequence[bytes], end_s: float) -> list[Location]:
        self.num_asked += 1
        if self.error is not None:
            raise self.error
        return []


def unwanted(reason: str) -> Done:
    return lambda *_: pytest.fail(reason)


async def ask_often(probe: PathProbe, locate: Empty, is_done: Callable[[], bool]) -> None:
    """As prompts do, one after the other, with time for whatever that begins."""
    for _ in range(200):
        probe.start(NAMES, locate, unwanted("nothing came"))
        await asyncio.sleep(0)
        if is_done():
            return


async def test_a_probe_in_vain_is_not_repeated_with_every_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nothing = Empty()
    async with make_probe() as probe:
        monkeypatch.setattr(path_probe, "INTERVAL_S", 3600.0)
        await ask_often(probe, nothing, lambda: False)
        assert nothing.num_asked == 1
        monkeypatch.setattr(path_probe, "INTERVAL_S", 0.0)
        await ask_often(probe, nothing, lambda: nothing.num_asked == 2)
        assert nothing.num_asked == 2


async def test_a_probe_that_breaks_is_told_of_and_not_the_last(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(path_probe, "INTERVAL_S", 0.0)
    broken = Empty(RuntimeError("of the index"))
    async with make_probe() as probe:
        with caplog.at_level(logging.ERROR, logger=path_probe.__name__):
            await ask_often(probe, broken, lambda: broken.num_asked == 2)
    assert broken.num_asked == 2
    assert "probing the path to the KV nodes failed" in caplog.text
    assert "of the index" in caplog.text
