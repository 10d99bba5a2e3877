"""KV memory: names, pins and sessions."""

import gc

import numpy as np
import pytest
from kvasir_kvstore._native import BlockPool

DIGEST = bytes(range(16))
NAME = b"n" * 16
OTHER = b"o" * 16


def make_pool(num_blocks: int = 4) -> BlockPool:
    return BlockPool(num_blocks=num_blocks, num_layers=3, layer_bytes=64, layout_digest=DIGEST)


def fill(pool: BlockPool, block: int, value: int = 7) -> None:
    pool.data[block] = value
    pool.ready[block] = pool.num_layers


def test_a_new_pool_is_zero_and_nothing_is_ready() -> None:
    pool = make_pool()
    assert pool.data.shape == (4, 192)
    assert not pool.data.any()
    assert not pool.ready.any()
    assert pool.ready.dtype == np.uint32
    assert pool.progress.shape == (1,)
    assert pool.layout_digest == DIGEST


def test_the_arrays_keep_the_memory_alive() -> None:
    pool = make_pool()
    data, ready = pool.data, pool.ready
    del pool
    gc.collect()
    data[:] = 9
    ready[:] = 3
    assert data.sum() == 9 * 4 * 192


@pytest.mark.parametrize(
    "change",
    [
        {"num_blocks": 0},
        {"num_layers": 0},
        {"layer_bytes": -1},
        {"layer_bytes": 1 << 40},
        {"layout_digest": b"short"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_malformed_shape_is_refused(change: dict[str, object]) -> None:
    shape = {"num_blocks": 1, "num_layers": 1, "layer_bytes": 64, "layout_digest": DIGEST}
    with pytest.raises(ValueError, match=next(iter(change))):
        BlockPool(**(shape | change))  # type: ignore[arg-type]


def test_more_memory_than_there_is_addresses_for_is_refused() -> None:
    with pytest.raises(RuntimeError, match="cannot map"):
        BlockPool(num_blocks=2**31 - 1, num_layers=4096, layer_bytes=1 << 28, layout_digest=DIGEST)


def test_only_a_whole_block_can_be_published() -> None:
    pool = make_pool()
    pool.ready[1] = 2
    with pytest.raises(ValueError, match="not whole"):
        pool.publish(NAME, 1)
    assert pool.lookup(NAME) is None


def test_the_first_block_of_a_name_keeps_it() -> None:
    pool = make_pool()
    fill(pool, 0)
    fill(pool, 1)
    assert pool.publish(NAME, 0)
    assert pool.publish(NAME, 0)
    assert not pool.publish(NAME, 1)
    assert pool.lookup(NAME) == 0
    assert pool.unpublish(NAME)
    assert pool.lookup(NAME) is None
    assert pool.publish(NAME, 1)


def test_a_block_has_one_name() -> None:
    pool = make_pool()
    fill(pool, 0)
    pool.publish(NAME, 0)
    with pytest.raises(ValueError, match="another name"):
        pool.publish(OTHER, 0)


def test_a_published_block_cannot_be_reset() -> None:
    pool = make_pool()
    fill(pool, 2)
    pool.publish(NAME, 2)
    with pytest.raises(ValueError, match="published"):
        pool.reset(2)
    pool.unpublish(NAME)
    pool.reset(2)
    assert pool.ready[2] == 0


def test_blocks_beyond_the_pool_are_refused() -> None:
    pool = make_pool()
    pool.open_session(1)
    for call in (
        lambda: pool.reset(4),
        lambda: pool.publish(NAME, 4),
        lambda: pool.extend_session(1, [0, 4]),
    ):
        with pytest.raises(IndexError, match="block 4"):
            call()


def test_a_session_opens_once_and_closes_for_good() -> None:
    pool = make_pool()
    pool.open_session(5)
    with pytest.raises(ValueError, match="already open"):
        pool.open_session(5)
    pool.extend_session(5, [1, 2])
    pool.finish_session(5)
    with pytest.raises(ValueError, match="finished"):
        pool.extend_session(5, [3])
    assert not pool.session_pulled(5)
    assert pool.num_sessions == 1
    assert pool.close_session(5)
    assert pool.close_session(5)
    assert pool.num_sessions == 0
    with pytest.raises(ValueError, match="no session"):
        pool.finish_session(5)


def test_session_changes_bump_progress() -> None:
    pool = make_pool()
    before = int(pool.progress[0])
    pool.open_session(1)
    pool.extend_session(1, [0])
    pool.finish_session(1)
    assert int(pool.progress[0]) == before + 3
