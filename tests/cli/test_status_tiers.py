"""What `kvasir status` says of a KV node's tiers."""

from kvasir_cli.commands.status import _tier_lines
from kvasir_proto.v1 import kvnode_pb2


def test_tiers_and_what_does_not_work_have_a_line_each() -> None:
    tiers = [
        kvnode_pb2.TierDescription(
            name="disk",
            blocks_total=10,
            blocks_used=4,
            bytes_used=4 << 20,
            blocks_written=6,
            blocks_read=2,
            blocks_dropped=3,
        ),
        kvnode_pb2.TierDescription(name="store", blocks_used=7, blocks_written=7),
    ]
    found = kvnode_pb2.KvNodeDescription(tiers=tiers, degraded=["disk: No space left on device"])
    disk, store, problem = _tier_lines(found)
    assert disk == "disk 4/10 blocks, 4.2 MB; 6 written, 2 read, 0 bad, 3 not written"
    assert store == "store 7 blocks, 0 B; 7 written, 0 read"
    assert problem == "disk: No space left on device"
