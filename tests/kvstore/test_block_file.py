"""Blocks on disk: what is read is what was written, wherever a write was torn or a byte changed."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kvasir_kvstore._native import BlockPool
from kvasir_kvstore.core.cache import Origin
from kvasir_kvstore.node.block_file import HEAD_BYTES, RECORD_BYTES, BlockFile, StoredBlock
from kvasir_proto.v1 import common_pb2
from kvstore_builders import fill, make_pool, name_of

NUM_SLOTS = 6
LAYOUT = common_pb2.KvLayout(digest=b"d" * 16, num_layers=3, block_bytes=768, block_tokens=32)
OTHER = common_pb2.KvLayout(digest=b"e" * 16, num_layers=3, block_bytes=768, block_tokens=32)


def store(file: BlockFile, pool: BlockPool, slots: list[int]) -> list[StoredBlock]:
    """Writes block i of the pool under name i into slot i."""
    blocks = [
        StoredBlock(
            slot,
            name_of(slot),
            Origin(tenant=bytes([slot + 1]) * 16, chain_head=name_of(0)),
            stored_ms=1000 + slot,
            checksum=pool.checksum(slot),
        )
        for slot in slots
    ]
    assert file.write([(block, memoryview(pool.data[block.slot])) for block in blocks]) is None
    return blocks


def make_source() -> BlockPool:
    pool = make_pool(NUM_SLOTS)
    for block in range(NUM_SLOTS):
        fill(pool, block, seed=block + 1)
    return pool


def readable(folder: Path, pool: BlockPool) -> set[bytes]:
    """Names that a new life of the node can read; each must be what the pool has."""
    target = make_pool(1)
    file = BlockFile(folder)
    whole = set()
    for block in file.begin(LAYOUT, num_slots=NUM_SLOTS):
        if file.read(block, target, 0):
            number = int.from_bytes(block.name, "big")
            assert np.array_equal(target.data[0], pool.data[number]), "a wrong block"
            whole.add(block.name)
    file.close()
    return whole


def test_what_was_written_is_found_by_a_later_life(tmp_path: Path) -> None:
    pool = make_source()
    file = BlockFile(tmp_path)
    assert file.layout is None
    assert file.begin(LAYOUT, num_slots=NUM_SLOTS) == []
    blocks = store(file, pool, [0, 2, 5])
    file.close()
    again = BlockFile(tmp_path)
    assert again.layout == LAYOUT
    assert again.begin(LAYOUT, num_slots=NUM_SLOTS) == blocks
    again.clear(2)
    again.close()
    assert readable(tmp_path, pool) == {name_of(0), name_of(5)}


def test_a_folder_has_one_user(tmp_path: Path) -> None:
    file = BlockFile(tmp_path)
    with pytest.raises(OSError, match="another process"):
        BlockFile(tmp_path)
    file.close()


def test_blocks_of_another_layout_are_forgotten(tmp_path: Path) -> None:
    file = BlockFile(tmp_path)
    file.begin(LAYOUT, num_slots=NUM_SLOTS)
    store(file, make_source(), [0, 1])
    assert file.begin(OTHER, num_slots=NUM_SLOTS) == []
    assert file.begin(LAYOUT, num_slots=NUM_SLOTS) == []
    file.close()


def test_less_space_keeps_what_lies_in_it(tmp_path: Path) -> None:
    file = BlockFile(tmp_path)
    file.begin(LAYOUT, num_slots=NUM_SLOTS)
    store(file, make_source(), [0, 1, 5])
    assert [block.slot for block in file.begin(LAYOUT, num_slots=2)] == [0, 1]
    assert (tmp_path / "blocks").stat().st_size == 2 * LAYOUT.block_bytes
    file.close()


def test_of_two_records_of_a_name_the_later_counts(tmp_path: Path) -> None:
    pool = make_source()
    file = BlockFile(tmp_path)
    file.begin(LAYOUT, num_slots=NUM_SLOTS)
    (first,) = store(file, pool, [1])
    later = StoredBlock(4, first.name, first.origin, first.stored_ms + 1, first.checksum)
    assert file.write([(later, memoryview(pool.data[1]))]) is None
    assert file.begin(LAYOUT, num_slots=NUM_SLOTS) == [later]
    file.close()


def offsets(size: int, step: int) -> list[int]:
    """Around every boundary of a file of equal parts, and within the parts."""
    edges = {at + delta for at in range(0, size + 1, step) for delta in (-1, 0, 1, step // 3)}
    return sorted(at for at in edges if 0 <= at < size)


def test_files_cut_anywhere_hold_no_wrong_block(tmp_path: Path) -> None:
    pool = make_source()
    file = BlockFile(tmp_path)
    file.begin(LAYOUT, num_slots=NUM_SLOTS)
    names = {block.name for block in store(file, pool, list(range(NUM_SLOTS)))}
    file.close()
    whole = {kind: (tmp_path / kind).read_bytes() for kind in ("records", "blocks")}
    for kind, step in (("records", RECORD_BYTES), ("blocks", LAYOUT.block_bytes)):
        for at in offsets(len(whole[kind]), step):
            (tmp_path / kind).write_bytes(whole[kind][:at])
            left = readable(tmp_path, pool)
            num_left = at // step - (HEAD_BYTES // step if kind == "records" else 0)
            assert left == {name_of(slot) for slot in range(max(num_left, 0))}
            for other, content in whole.items():
                (tmp_path / other).write_bytes(content)
    assert readable(tmp_path, pool) == names


def test_a_bit_that_changed_anywhere_costs_its_block_alone(tmp_path: Path) -> None:
    pool = make_source()
    file = BlockFile(tmp_path)
    file.begin(LAYOUT, num_slots=NUM_SLOTS)
    names = {block.name for block in store(file, pool, list(range(NUM_SLOTS)))}
    file.close()
    for kind, begin, step in (
        ("records", HEAD_BYTES, RECORD_BYTES),
        ("blocks", 0, LAYOUT.block_bytes),
    ):
        content = bytearray((tmp_path / kind).read_bytes())
        for at in [begin + at for at in offsets(len(content) - begin, step)]:
            content[at] ^= 1 << at % 8
            (tmp_path / kind).write_bytes(content)
            assert readable(tmp_path, pool) == names - {name_of((at - begin) // step)}
            content[at] ^= 1 << at % 8
        (tmp_path / kind).write_bytes(content)
    head = bytearray((tmp_path / "records").read_bytes())
    head[5] ^= 1
    (tmp_path / "records").write_bytes(head)
    assert readable(tmp_path, pool) == set(), "a head that is not right says nothing of the rest"


def test_swapped_blocks_and_records_are_not_there(tmp_path: Path) -> None:
    pool = make_source()
    for kind, begin, step in (
        ("records", HEAD_BYTES, RECORD_BYTES),
        ("blocks", 0, LAYOUT.block_bytes),
    ):
        file = BlockFile(tmp_path)
        file.begin(OTHER, num_slots=NUM_SLOTS)
        file.begin(LAYOUT, num_slots=NUM_SLOTS)
        store(file, pool, [0, 1, 2])
        file.close()
        content = bytearray((tmp_path / kind).read_bytes())
        first, second = begin + step, begin + 2 * step
        content[begin:first], content[first:second] = content[first:second], content[begin:first]
        (tmp_path / kind).write_bytes(content)
        assert readable(tmp_path, pool) == {name_of(2)}


@given(
    kept=st.lists(st.tuples(st.sampled_from(["records", "blocks"]), st.integers(0, 40)), max_size=6)
)
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40
)
def test_an_overwrite_torn_in_any_order_leaves_the_old_the_new_or_nothing(
    tmp_path: Path, kept: list[tuple[str, int]]
) -> None:
    """A power cut keeps any of the sectors that were written, whatever their order."""
    pool = make_source()
    sector = 64
    file = BlockFile(tmp_path)
    file.begin(OTHER, num_slots=NUM_SLOTS)
    file.begin(LAYOUT, num_slots=NUM_SLOTS)
    store(file, pool, [0, 1])
    before = {kind: bytearray((tmp_path / kind).read_bytes()) for kind in ("records", "blocks")}
    again = StoredBlock(0, name_of(3), Origin(), 2000, pool.checksum(3))
    assert file.write([(again, memoryview(pool.data[3]))]) is None
    file.close()
    after = {kind: (tmp_path / kind).read_bytes() for kind in before}
    for kind, number in kept:
        at = (HEAD_BYTES if kind == "records" else 0) + number * sector
        before[kind][at : at + sector] = after[kind][at : at + sector]
    for kind, content in before.items():
        (tmp_path / kind).write_bytes(content)
    assert name_of(1) in readable(tmp_path, pool)


def test_a_disk_that_does_not_take_a_batch_takes_none_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_source()
    file = BlockFile(tmp_path)
    file.begin(LAYOUT, num_slots=NUM_SLOTS)
    store(file, pool, [0])

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    block = StoredBlock(1, name_of(1), Origin(), 1, pool.checksum(1))
    error = file.write([(block, memoryview(pool.data[1]))])
    assert error is not None
    file.close()
    assert readable(tmp_path, pool) == {name_of(0)}
