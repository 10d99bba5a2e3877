"""What `kvasir status` says of a KV node's tiers."""

from kvasir_cli.commands.status import _reuse_lines, _tier_lines
from kvasir_proto.v1 import kvnode_pb2, worker_pb2


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


def test_what_was_reused_and_why_other_blocks_were_not_has_a_line() -> None:
    links = [
        worker_pb2.KvLink(peer="prefill-0", codec="int8", bytes_per_s=2.5e8, transport="tcp"),
        worker_pb2.KvLink(peer="kv-0", codec="raw", transport="nixl"),
    ]
    reuse = worker_pb2.KvReuse(
        prompt_tokens={"computed": 8, "fetched": 192},
        tier_blocks={"unknown": 3, "fetched": 6, "slow": 1},
        links=links,
    )
    assert _reuse_lines(reuse) == [
        "prompt tokens: 8 computed, 192 fetched",
        "blocks wanted of KV nodes: 6 fetched, 1 slow, 3 unknown",
        "KV from prefill-0: int8 over tcp, 250.0 MB/s",
        "KV from kv-0: raw over nixl",
    ]
    assert _reuse_lines(worker_pb2.KvReuse()) == []
