"""Transfers between peers that share a key: secret, authenticated both ways, never replayed."""

import os
from pathlib import Path

import numpy as np
import pytest
from kv_fleet import LAYOUT, make_holder, running_node
from kvasir_kvstore._native import BlockClient, BlockServer, crc32c
from kvasir_kvstore.node.settings import KvNodeSettings
from kvasir_kvstore.peers import DataPlane
from kvstore_builders import (
    EPOCH,
    UID,
    InThread,
    Wire,
    fill,
    make_pair,
    make_pool,
    wait_until,
)
from pydantic import ValidationError

KEY = bytes(range(32))
GREETING_BYTES = 40 + 64


def test_blocks_arrive_equal_and_their_bytes_are_never_on_the_wire() -> None:
    seen: list[bytes] = []

    def listen(_: int, data: bytes) -> bytes:
        seen.append(data)
        return data

    with make_pair(3, num_layers=5, layer_bytes=200_000, key=KEY) as pair:
        names = pair.publish(3)
        with Wire(pair.server.port, listen) as wire:
            pair.port = wire.port
            for _ in range(2):
                result = pair.pull_named([*names[:2], b"?" * 16, names[2]][:3], [2, 1, 0])
                assert (result.error, result.transport) == ("", "tcp-encrypted")
                assert result.blocks_ok == [True, True, False]
        assert np.array_equal(pair.target.data[2], pair.source.data[0])
        sent = b"".join(seen)
        assert len(sent) > 2 * 2 * pair.source.data.shape[1]
        for layer in range(5):
            start = layer * 200_000
            assert pair.source.data[0][start : start + 32].tobytes() not in sent


@pytest.mark.parametrize("is_local", [False, True], ids=["tcp", "shared memory"])
def test_a_session_is_encrypted_layer_by_layer(tmp_path: Path, is_local: bool) -> None:
    with make_pair(key=KEY, socket_dir=str(tmp_path) if is_local else "") as pair:
        fill(pair.source, 4, seed=4)
        pair.source.ready[4] = 0
        pair.source.open_session(7)
        pair.source.extend_session(7, [4])
        pull = InThread(lambda: pair.pull_session(7, [1]))
        for layers in (1, 2, 3):
            pair.source.ready[4] = layers
            pair.source.progress[0] += 1
            wait_until(lambda n=layers: pair.target.ready[1] == n, "it")  # type: ignore[misc]
            pair.assert_only_right_bytes_are_ready([1], [4])
        pair.source.finish_session(7)
        result = pull.result()
        assert (result.error, result.blocks_ok) == ("", [True])
        assert result.transport == ("shm" if is_local else "tcp-encrypted")
        wait_until(lambda: pair.source.session_pulled(7), "the acknowledgement")


@pytest.mark.parametrize("is_local", [False, True], ids=["tcp", "shared memory"])
@pytest.mark.parametrize(
    ("server_key", "client_key"),
    [(KEY, b"w" * 32), (KEY, b""), (b"", KEY)],
    ids=["another key", "no key", "a key where none is expected"],
)
def test_peers_without_the_same_key_get_nothing(
    tmp_path: Path, server_key: bytes, client_key: bytes, is_local: bool
) -> None:
    folder = str(tmp_path) if is_local else ""
    with make_pair(key=server_key, socket_dir=folder) as pair:
        pair.publish(1)
        client = BlockClient(pair.target, socket_dir=folder, key=client_key)
        pair.client = client
        result = pair.pull_named()
        assert (result.error, result.blocks_ok) == ("unauthenticated", [False])
        assert pair.target.ready[0] == 0
        wait_until(lambda: pair.server.stats()["unauthenticated"] == 1, "the server to count")
        assert pair.server.stats()["blocks_sent"] == 0


def test_a_change_whose_checksum_was_mended_is_noticed() -> None:
    """What a checksum cannot tell: somebody who changes a header and makes its checksum anew."""

    def mend(offset: int, data: bytes) -> bytes:
        at = GREETING_BYTES - offset
        if 0 <= at < len(data):
            frame = bytearray(data[at : at + 64])
            frame[8] ^= 1  # the ordinal: the first block would land in the place of the second
            frame[40:56] = b"\0" * 15 + b"\2"  # and under its name
            frame[60:64] = crc32c(bytes(frame[:60])).to_bytes(4, "little")
            return data[:at] + bytes(frame) + data[at + 64 :]
        return data

    with make_pair(2, num_layers=2, layer_bytes=100_000, key=KEY) as pair:
        pair.publish(2)
        with Wire(pair.server.port, mend) as wire:
            pair.port = wire.port
            result = pair.pull_named()
        assert (result.error, result.frames_bad) == ("bad_frame", 1)
        assert result.blocks_ok == [False, False]
        assert not pair.target.ready.any()


def test_a_recorded_connection_cannot_be_played_again() -> None:
    recorded: list[bytes] = []

    def record(_: int, data: bytes) -> bytes:
        recorded.append(data)
        return data

    with make_pair(1, key=KEY) as pair:
        pair.publish(1)
        with Wire(pair.server.port, record) as wire:
            pair.port = wire.port
            assert pair.pull_named().error == ""
        old = b"".join(recorded)

        def replay(offset: int, data: bytes) -> bytes:
            return old[offset : offset + len(data)]

        with Wire(pair.server.port, replay) as wire:
            pair.port = wire.port
            assert pair.pull_named().error == "unauthenticated"


@pytest.mark.parametrize("is_local", [False, True], ids=["tcp", "shared memory"])
async def test_a_kv_node_serves_those_who_hold_its_key(tmp_path: Path, is_local: bool) -> None:
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "kv").mkdir()
    folder = str(tmp_path / "kv") if is_local else ""
    ours, theirs = DataPlane(folder, KEY), DataPlane(folder, b"w" * 32)
    names = [os.urandom(16) for _ in range(3)]
    with running_node(kv_key_file=tmp_path / "key", kv_socket_dir=folder or None) as node:
        async with make_holder([node.spec], plane=ours) as a:
            a.publish(names)
            await a.offer(names)
            fetched = await a.tier.locate_and_fetch(names, [9, 8, 7], timeout_ms=20_000)
            assert (fetched.num_fetched_leading, fetched.problem) == (3, "")
        async with make_holder([node.spec], plane=theirs) as b:
            fetched = await b.tier.locate_and_fetch(names, [9, 8, 7], timeout_ms=20_000)
            assert (fetched.num_fetched_leading, fetched.problem) == (0, "unauthenticated")
            assert not b.pool.ready.any()
        transport = "shm" if is_local else "tcp-encrypted"
        moved = f'kvasir_kvnode_transport_bytes_total{{transport="{transport}"}}'
        assert node.metric(moved) == 3 * LAYOUT.block_bytes
        assert node.metric("kvasir_kvnode_unauthenticated_total") == 1


def test_a_short_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        BlockServer(make_pool(), host="127.0.0.1", port=0, uid=UID, epoch=EPOCH, key=b"short")
    with pytest.raises(ValueError, match="32 bytes"):
        BlockClient(make_pool(), key=b"short")
    file = tmp_path / "key"
    with pytest.raises(ValidationError, match="cannot read"):
        KvNodeSettings(name="a", kv_key_file=file)
    file.write_bytes(b"short\n")
    with pytest.raises(ValidationError, match="has 6 bytes"):
        KvNodeSettings(name="a", kv_key_file=file)


def test_the_key_is_the_whole_file(tmp_path: Path) -> None:
    """A key of random bytes may end in what looks like the end of a line."""
    file = tmp_path / "key"
    file.write_bytes(KEY[:-1] + b"\n")
    settings = KvNodeSettings(name="a", kv_key_file=file, kv_socket_dir=tmp_path)
    assert settings.data_plane == DataPlane(socket_dir=str(tmp_path), key=KEY[:-1] + b"\n")
    assert KvNodeSettings(name="a").data_plane == DataPlane()
    with pytest.raises(ValidationError, match="not a folder"):
        KvNodeSettings(name="a", kv_socket_dir=file)
    with pytest.raises(ValidationError, match="cannot write to /proc"):
        KvNodeSettings(name="a", kv_socket_dir=Path("/proc"))
