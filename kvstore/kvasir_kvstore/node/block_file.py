"""Blocks of one layout in files: slots of equal size, each known by a record that is checked.

Two files in one folder. `blocks` holds the payloads, slot after slot; `records` says of each slot
what lies in it: the block's name and origin, the checksum of its payload, and the checksum of the
record itself, which begins with the layout and the slot's number. Invariant: what `read` returns
True for is, byte for byte, what was written under that name, whenever the process or machine
stopped in between; anything else is not there. How: a record is cleared before its slot is written
and set after the payload is synced, and whatever reaches the disk in another order fails a
checksum. Blocking; slots and names are chosen by others, and no slot is used by two at a time.
"""

import fcntl
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError
from kvasir_proto.v1 import common_pb2

from kvasir_kvstore._native import BlockPool, crc32c
from kvasir_kvstore.core.cache import Origin

RECORD_BYTES = 128
HEAD_BYTES = 4096
_MAGIC = b"KvR1"
_RECORD = struct.Struct("<4sI16s16s16sQI")  # magic, slot, name, tenant, head, stored, checksum
_CHECKSUM = struct.Struct("<I")
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """What a slot's record says."""

    slot: int
    name: bytes
    origin: Origin
    stored_ms: int
    """Unix time."""
    checksum: int
    """CRC-32C of the payload."""


class BlockFile:
    """The two files of one folder, which no other process uses."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError: the folder cannot be written to, or another process uses it."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._records = os.open(folder / "records", flags, 0o600)
        self._blocks = os.open(folder / "blocks", flags, 0o600)
        try:
            fcntl.flock(self._records, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise OSError(error.errno, f"{folder} is used by another process") from error
        self._layout = self._read_layout()

    @property
    def layout(self) -> common_pb2.KvLayout | None:
        """Of the blocks that are stored; none: nothing is."""
        return self._layout

    def close(self) -> None:
        """Closes the files."""
        os.close(self._records)
        os.close(self._blocks)

    def begin(self, layout: common_pb2.KvLayout, *, num_slots: int) -> list[StoredBlock]:
        """Keeps the blocks of this layout that lie in the first slots; forgets all others."""
        if self._layout != layout:
            self._layout = None
            os.ftruncate(self._records, 0)
            os.ftruncate(self._blocks, 0)
            text = layout.SerializeToString(deterministic=True)
            head = _LENGTH.pack(len(text)) + text
            os.pwrite(self._records, head + _CHECKSUM.pack(crc32c(head)), 0)
            self._layout = layout
        for file, end in (
            (self._records, HEAD_BYTES + num_slots * RECORD_BYTES),
            (self._blocks, num_slots * layout.block_bytes),
        ):
            if os.fstat(file).st_size > end:
                os.ftruncate(file, end)
        return self._scan(num_slots)

    def write(self, blocks: Sequence[tuple[StoredBlock, memoryview]]) -> OSError | None:
        """Stores blocks in their slots, all or, if an error is returned, none of them."""
        try:
            for block, payload in blocks:
                self.clear(block.slot)
                _write_all(self._blocks, payload, block.slot * len(payload))
            os.fdatasync(self._blocks)
            for block, _ in blocks:
                _write_all(self._records, memoryview(self._pack(block)), _record_at(block.slot))
        except OSError as error:
            return error
        return None

    def read(self, block: StoredBlock, pool: BlockPool, target: int) -> bool:
        """Fills the pool's block; False: what lies in the slot is not what was stored."""
        payload = memoryview(pool.data[target])
        done = 0
        while done < len(payload):
            at = block.slot * len(payload) + done
            count = os.preadv(self._blocks, [payload[done:]], at)
            if count == 0:
                return False
            done += count
        return pool.checksum(target) == block.checksum

    def clear(self, slot: int) -> None:
        """Nothing lies in this slot any more."""
        _write_all(self._records, memoryview(bytes(RECORD_BYTES)), _record_at(slot))

    def _pack(self, block: StoredBlock) -> bytes:
        origin = block.origin
        fields = _RECORD.pack(
            _MAGIC,
            block.slot,
            block.name,
            origin.tenant,
            origin.chain_head,
            block.stored_ms,
            block.checksum,
        )
        padded = fields.ljust(RECORD_BYTES - _CHECKSUM.size, b"\0")
        return padded + _CHECKSUM.pack(self._record_checksum(padded))

    def _record_checksum(self, padded: bytes) -> int:
        assert self._layout is not None
        return crc32c(self._layout.digest + padded)

    def _scan(self, num_slots: int) -> list[StoredBlock]:
        """Blocks whose records are right; of two with one name, the later."""
        found: dict[bytes, StoredBlock] = {}
        records = _read_all(self._records, HEAD_BYTES, num_slots * RECORD_BYTES)
        for slot in range(len(records) // RECORD_BYTES):
            block = self._unpack(records[slot * RECORD_BYTES : (slot + 1) * RECORD_BYTES])
            if block is None or block.slot != slot:
                continue
            if block.name not in found or found[block.name].stored_ms <= block.stored_ms:
                found[block.name] = block
        return list(found.values())

    def _unpack(self, record: bytes) -> StoredBlock | None:
        padded, checksum = record[: -_CHECKSUM.size], record[-_CHECKSUM.size :]
        if record[: len(_MAGIC)] != _MAGIC or _CHECKSUM.unpack(checksum) != (
            self._record_checksum(padded),
        ):
            return None
        _, slot, name, tenant, head, stored_ms, crc = _RECORD.unpack_from(padded)
        origin = Origin(tenant=tenant.rstrip(b"\0") and tenant, chain_head=head)
        return StoredBlock(slot, name, origin, stored_ms, crc)

    def _read_layout(self) -> common_pb2.KvLayout | None:
        head = _read_all(self._records, 0, HEAD_BYTES)
        length = _LENGTH.unpack_from(head)[0] + _LENGTH.size if len(head) >= 4 else HEAD_BYTES
        if length + _CHECKSUM.size > len(head):
            return None
        if _CHECKSUM.unpack_from(head, length) != (crc32c(head[:length]),):
            return None
        try:
            return common_pb2.KvLayout.FromString(head[_LENGTH.size : length])
        except DecodeError:
            return None


def _record_at(slot: int) -> int:
    return HEAD_BYTES + slot * RECORD_BYTES


def _write_all(file: int, data: memoryview, at: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], at + done)


def _read_all(file: int, at: int, size: int) -> bytes:
    parts = []
    while size and (part := os.pread(file, size, at)):
        parts.append(part)
        at, size = at + len(part), size - len(part)
    return b"".join(parts)
