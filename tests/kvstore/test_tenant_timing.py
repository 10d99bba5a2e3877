"""What one tenant may learn of another's prompts by asking for them: nothing, by count or by time.

The same questions put by the tenant itself show the difference, so the measurement could see one.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from kv_fleet import NodeProcess, running_node
from kvasir_kvstore.core import fetch
from worker_builders import RunningWorker, make_model_dir, make_request, prompt, started, until

TOKENS = 320
PROMPTS_OF_A_KIND = 15
P_MIN = 0.001
ROUNDS = 3
PERMUTATIONS = 20_000


@dataclass
class Probes:
    """Answers to prompts that tenant A has cached (True) and to such that nobody has (False)."""

    ttfts_ms: dict[bool, list[float]]
    counts: dict[bool, set[tuple[int, int, int]]]
    """Distinct (tokens computed, cached here, fetched)."""

    @property
    def p_value(self) -> float:
        """How often chance ranks the two kinds as differently as they were."""
        times_ms = np.array(self.ttfts_ms[True] + self.ttfts_ms[False])
        ranks = np.argsort(np.argsort(times_ms)) + 1.0
        of_a_kind = len(self.ttfts_ms[True])
        orders = np.random.default_rng(0).permuted(np.tile(ranks, (PERMUTATIONS, 1)), axis=1)
        sums = np.append(orders[:, :of_a_kind].sum(axis=1), ranks[:of_a_kind].sum())
        away = np.abs(sums - ranks.mean() * of_a_kind)
        return float((away >= away[-1]).mean())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[NodeProcess]:
    """Whatever it holds is fetched, however long that takes."""
    monkeypatch.setattr(fetch, "GAIN_MIN", 0.0)
    monkeypatch.setattr(fetch, "LOSS_SHARE_MAX", 1e9)
    with running_node(memory_mb=64) as node:
        yield node


async def probe(a: RunningWorker, b: RunningWorker, *, salt: bytes, turn: int) -> Probes:
    """Tenant A asks worker a; then whoever has this salt asks worker b, in a mixed order."""
    seeds = range(1 + 2 * PROMPTS_OF_A_KIND * turn, 1 + 2 * PROMPTS_OF_A_KIND * (turn + 1))
    for seed in seeds[::2]:
        await a.generate(make_request(prompt(TOKENS, seed=seed), tenant_salt=b"a", max_tokens=1))
    await until(lambda: a.host.served().tier.num_offers_pending == 0)
    found = Probes({True: [], False: []}, {True: set(), False: set()})
    for seed in random.Random(turn).sample(seeds, len(seeds)):
        is_cached = seed in seeds[::2]
        request = make_request(prompt(TOKENS, seed=seed), tenant_salt=salt, max_tokens=1)
        started_s = time.perf_counter()
        stats = (await b.generate(request)).stats
        found.ttfts_ms[is_cached].append((time.perf_counter() - started_s) * 1000)
        tokens = (stats.tokens_computed, stats.tokens_cached_local, stats.tokens_cached_fetched)
        found.counts[is_cached].add(tokens)
    return found


async def test_what_tenant_a_cached_takes_tenant_b_as_long_as_what_nobody_did(
    model: Path, node: NodeProcess
) -> None:
    """By chance one round in a thousand differs so much; not each of three."""
    settings = {"kv_nodes": (node.spec,), "kv_cache_mb": 8}
    async with started(model, "a", **settings) as a, started(model, "b", **settings) as b:
        for turn in range(ROUNDS):
            found = await probe(a, b, salt=b"b", turn=turn)
            assert found.counts[True] == found.counts[False] == {(TOKENS, 0, 0)}
            if found.p_value > P_MIN:
                break
        assert found.p_value > P_MIN, found.ttfts_ms
        assert {"fetched", "loaded", "lost"}.isdisjoint(b.host.served().tier.counts)
        assert node.metric("kvasir_kvnode_blocks_served_total") == 0


async def test_the_same_probes_by_the_tenant_itself_see_what_is_cached(
    model: Path, node: NodeProcess
) -> None:
    settings = {"kv_nodes": (node.spec,), "kv_cache_mb": 8}
    async with started(model, "a", **settings) as a, started(model, "b", **settings) as b:
        for turn in range(ROUNDS):
            found = await probe(a, b, salt=b"a", turn=turn)
            assert found.counts[False] == {(TOKENS, 0, 0)}
            assert found.counts[True] == {(32, 0, TOKENS - 32)}
            if found.p_value < P_MIN:
                break
        assert found.p_value < P_MIN, found.ttfts_ms
        assert np.median(found.ttfts_ms[True]) < np.median(found.ttfts_ms[False])
