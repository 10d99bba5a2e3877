"""Policies of eviction on small traces: what each holds, and that none holds more than it may."""

import json
import random
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from kvasir_cli.commands.sim_cache import cache as command
from kvasir_sim.cache import CACHES, compare, hit_share
from kvasir_sim.trace import TraceRequest


def request(*blocks: int) -> TraceRequest:
    names = tuple(block.to_bytes(16, "little") for block in blocks)
    return TraceRequest(0.0, 512 * len(names), 1, names)


def scan_and_hot(seed: int = 1) -> list[TraceRequest]:
    """A few chains that come again and again between many that come once."""
    source = random.Random(seed)
    once = iter(range(1000, 100_000))
    return [
        request(*range(10 * hot, 10 * hot + 4)) if hot < 4 else request(*(next(once),) * 1)
        for hot in (source.randrange(40) for _ in range(4000))
    ]


@pytest.mark.parametrize("policy", CACHES)
def test_a_cache_of_everything_saves_all_that_was_there_before(policy: str) -> None:
    requests = [request(1, 2, 3), request(1, 2, 4), request(9, 2), request(1, 2, 3)]
    assert hit_share(CACHES[policy](100), requests) == (2 + 0 + 3) / 11


@pytest.mark.parametrize("policy", CACHES)
def test_only_the_leading_run_is_saved(policy: str) -> None:
    assert hit_share(CACHES[policy](100), [request(1, 2), request(3, 2)]) == 0


def test_value_keeps_what_comes_again_where_lru_does_not() -> None:
    share = 0.005
    found = {row.policy: row.hit_share for row in compare(scan_and_hot(), shares=[share])}
    assert found["value"] > found["lru"]
    assert found["value"] >= 0.9 * found["s3fifo"]


@pytest.mark.parametrize("policy", CACHES)
@given(num_slots=st.integers(1, 8), wanted=st.lists(st.integers(0, 12), max_size=80))
def test_a_cache_holds_what_was_wanted_last_and_no_more_than_it_may(
    policy: str, num_slots: int, wanted: list[int]
) -> None:
    cache = CACHES[policy](num_slots)
    for number in wanted:
        cache.want(number.to_bytes(16, "big"))
        assert number.to_bytes(16, "big") in cache
        assert sum(n.to_bytes(16, "big") in cache for n in range(13)) <= num_slots


def test_the_command_prints_and_writes_all_policies(tmp_path: Path) -> None:
    trace, out = tmp_path / "trace.jsonl", tmp_path / "out.json"
    lines = [
        {"timestamp": i, "input_length": 1024, "output_length": 1, "hash_ids": [1, i % 5]}
        for i in range(40)
    ]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = CliRunner().invoke(
        command, ["--trace", str(trace), "--share", "0.5", "--json", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert [row["policy"] for row in json.loads(out.read_text())] == list(CACHES)
