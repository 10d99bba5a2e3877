"""Key records as messages, and back. What a peer sends is checked before the core sees it."""

from collections.abc import Iterable, Iterator

from kvasir_kvstore.core.block import NAME_BYTES
from kvasir_proto.v1 import peering_pb2

from kvasir_router.core.exchange import RECORDS_MAX, Edge, EdgeRecord

REPLICA_BYTES = 16
DEPTH_MAX = 4_096
VERSION_MAX = 2**53
"""More decisions than any fleet makes; a peer that says so is broken."""


def to_messages(records: Iterable[EdgeRecord]) -> list[peering_pb2.KeyRecord]:
    """The core's records for the wire."""
    return [
        peering_pb2.KeyRecord(
            name=record.name,
            depth=record.edge.depth if record.edge else 0,
            end=record.edge.end if record.edge else b"",
            version=record.version,
            origin=record.origin,
        )
        for record in records
    ]


def from_messages(messages: Iterable[peering_pb2.KeyRecord]) -> Iterator[EdgeRecord]:
    """The records of a peer; malformed ones, and those beyond RECORDS_MAX, are left out."""
    for _, message in zip(range(RECORDS_MAX), messages, strict=False):
        if _is_sound(message):
            edge = Edge(message.depth, message.end) if message.depth else None
            yield EdgeRecord(message.name, edge, message.version, message.origin)


def _is_sound(message: peering_pb2.KeyRecord) -> bool:
    end_bytes = NAME_BYTES if message.depth else 0
    return (
        len(message.name) == NAME_BYTES
        and len(message.end) == end_bytes
        and message.depth != 1
        and message.depth <= DEPTH_MAX
        and 0 < message.version <= VERSION_MAX
        and len(message.origin) == REPLICA_BYTES
    )
