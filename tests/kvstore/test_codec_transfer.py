"""KV that travels encoded: by name and by session, plain and encrypted, whole or a miss."""

import itertools
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from kvasir_kvstore import _native, bench_codecs
from kvasir_kvstore._native import BlockClient, BlockServer, PullResult
from kvasir_kvstore.codecs import CodecTerms, LinkCodecs, measured_rates
from kvasir_kvstore.core.block import KvLayout
from kvasir_kvstore.core.codecs import CODECS, RAW
from kvasir_kvstore.peers import DataPlane
from kvasir_kvstore.pulls import NamedPuller
from kvasir_proto.v1 import common_pb2
from kvstore_builders import EPOCH, UID, Pair, Wire, fill, make_pool, name_of, wait_until

HEADS, HEAD_DIM, LAYERS = 2, 64, 5
LAYER_BYTES = 2 * HEADS * 32 * HEAD_DIM * 2
BLOCKS = 3
KEYS = {"plain": b"", "encrypted": b"k" * 32}
SHAPE = {"num_heads": HEADS, "head_dim": HEAD_DIM}


def fill_values(pair: Pair, block: int) -> None:
    values = np.random.default_rng(block).standard_normal(LAYERS * LAYER_BYTES // 2, np.float32)
    pair.source.data[block] = (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
    pair.source.ready[block] = LAYERS


@contextmanager
def make_lossy_pair(key: bytes = b"") -> Iterator[Pair]:
    source = make_pool(BLOCKS, num_layers=LAYERS, layer_bytes=LAYER_BYTES)
    target = make_pool(BLOCKS, num_layers=LAYERS, layer_bytes=LAYER_BYTES)
    server = BlockServer(source, host="127.0.0.1", port=0, uid=UID, epoch=EPOCH, key=key)
    client = BlockClient(target, key=key, **SHAPE)
    pair = Pair(source, target, server, client)
    for block in range(BLOCKS):
        fill_values(pair, block)
        source.publish(name_of(block + 1), block)
        pair.names.append(name_of(block + 1))
    try:
        yield pair
    finally:
        client.close()
        server.stop()


def pull(pair: Pair, codec: str, *, timeout_ms: int = 20_000) -> PullResult:
    return pair.client.pull_named(
        host="127.0.0.1",
        port=pair.port or pair.server.port,
        uid=UID,
        epoch=EPOCH,
        names=pair.names,
        blocks=list(range(BLOCKS)),
        timeout_ms=timeout_ms,
        codec=codec,
    )


def round_trip(block: np.ndarray, codec: str) -> np.ndarray:
    """What the frames of one block, of all its layers here, come to."""
    encoded = np.empty(_native.codec_bytes_max(codec, **SHAPE, num_layers=LAYERS), np.uint8)
    size = _native.codec_encode(codec, block, encoded, **SHAPE)
    decoded = np.empty_like(block)
    assert _native.codec_decode(encoded[:size], decoded, **SHAPE) == ""
    return decoded


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("codec", CODECS)
def test_named_blocks_arrive_as_the_codec_leaves_them(codec: str, key: bytes) -> None:
    with make_lossy_pair(key) as pair:
        result = pull(pair, codec)
        assert (result.error, result.blocks_ok, result.is_lossy) == ("", [True] * BLOCKS, True)
        assert result.bytes_moved == BLOCKS * LAYERS * LAYER_BYTES
        assert 0 < result.bytes_wire < 0.53 * result.bytes_moved
        assert result.wire_s > 0
        for block in range(BLOCKS):
            expected = round_trip(pair.source.data[block], codec)
            assert np.array_equal(pair.target.data[block], expected)
            assert pair.target.ready[block] == LAYERS
        wait_until(lambda: pair.server.stats()["blocks_sent"] == BLOCKS, "the server to count")
        assert pair.server.stats()["bytes_sent"] == result.bytes_wire


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_a_session_is_encoded_layer_by_layer(key: bytes) -> None:
    with make_lossy_pair(key) as pair:
        pair.source.open_session(5)
        pair.source.extend_session(5, [1, 2])
        pair.source.finish_session(5)
        result = pair.client.pull_session(
            host="127.0.0.1",
            port=pair.server.port,
            uid=UID,
            epoch=EPOCH,
            session_id=5,
            blocks=[0, 1],
            timeout_ms=20_000,
            codec="int8",
        )
        assert (result.error, result.blocks_ok, result.is_lossy) == ("", [True] * 2, True)
        for target, source in ((0, 1), (1, 2)):
            assert np.array_equal(
                pair.target.data[target], round_trip(pair.source.data[source], "int8")
            )


def test_raw_stays_exact_on_a_client_that_could_decode() -> None:
    with make_lossy_pair() as pair:
        result = pull(pair, "raw")
        assert (result.error, result.is_lossy) == ("", False)
        assert result.bytes_wire == result.bytes_moved
        assert np.array_equal(pair.target.data, pair.source.data)


def test_layers_that_no_codec_takes_travel_raw() -> None:
    with make_lossy_pair() as pair:
        infinite = np.full(1, 0x7F80, "<u2").view(np.uint8)
        pair.source.data[1][:2] = infinite
        result = pull(pair, "int4")
        assert (result.error, result.blocks_ok) == ("", [True] * BLOCKS)
        assert np.array_equal(pair.target.data[1], pair.source.data[1])
        assert not np.array_equal(pair.target.data[0], pair.source.data[0])


def test_a_peer_whose_heads_do_not_fit_is_refused() -> None:
    with make_lossy_pair() as pair:
        with pytest.raises(ValueError, match="heads"):
            BlockClient(pair.target, num_heads=HEADS, head_dim=32)
        with pytest.raises(ValueError, match="raw only"):
            BlockClient(pair.target).pull_named(
                host="127.0.0.1",
                port=pair.server.port,
                uid=UID,
                epoch=EPOCH,
                names=pair.names,
                blocks=[0, 1, 2],
                timeout_ms=1000,
                codec="int8",
            )


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("codec", CODECS)
def test_damage_on_the_way_never_becomes_ready(codec: str, key: bytes) -> None:
    source = random.Random(0)
    with make_lossy_pair(key) as pair:
        expected = [round_trip(pair.source.data[block], codec) for block in range(BLOCKS)]
        for _ in range(15):
            at, bit = 40 + source.randrange(20_000), source.randrange(8)

            def change(offset: int, data: bytes, at: int = at, bit: int = bit) -> bytes:
                place = at - offset
                if not 0 <= place < len(data):
                    return data
                return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]

            with Wire(pair.server.port, change) as wire:
                pair.port = wire.port
                result = pull(pair, codec, timeout_ms=500)
            assert result.error
            for block, is_ok in enumerate(result.blocks_ok):
                assert pair.target.ready[block] == (LAYERS if is_ok else 0)
                if is_ok:
                    assert np.array_equal(pair.target.data[block], expected[block])


def test_noise_that_looks_like_a_block_is_encoded_within_its_bounds() -> None:
    """Random bits, among them values that are not finite: some travel raw, none go wrong."""
    with make_lossy_pair() as pair:
        for block in range(BLOCKS):
            pair.source.unpublish(name_of(block + 1))
            fill(pair.source, block, seed=block)
            pair.source.publish(name_of(block + 1), block)
        for codec in CODECS:
            result = pull(pair, codec)
            assert (result.error, result.blocks_ok) == ("", [True] * BLOCKS)


def make_source(number: int = 0) -> common_pb2.PeerAddress:
    return common_pb2.PeerAddress(uid=number.to_bytes(16, "big"))


def came(
    links: LinkCodecs, source: common_pb2.PeerAddress, *, bytes_wire: int, wire_s: float
) -> None:
    links.pulled(source, transport="tcp", codec=RAW, bytes_wire=bytes_wire, wire_s=wire_s)


def test_a_link_is_described_by_how_blocks_came_not_by_what_was_asked_for() -> None:
    links = LinkCodecs(CodecTerms("int8", CODECS, HEADS, HEAD_DIM))
    source = make_source(1)
    assert links.choose(source, num_bytes=1 << 24) == "int8"
    assert links.known() == []
    links.pulled(source, transport="nixl", codec=RAW, bytes_wire=0, wire_s=0.0)
    assert links.choose(source, num_bytes=1 << 24) == "int8"
    (link,) = links.known()
    assert (link.transport, link.codec, link.bytes_per_s) == ("nixl", RAW, 0)


def test_only_what_is_allowed_is_asked_for() -> None:
    for mode, allowed in itertools.product((*CODECS, "auto", "raw"), ((), ("int8",), CODECS)):
        terms = CodecTerms(mode, allowed, HEADS, HEAD_DIM)
        links = LinkCodecs(terms)
        came(links, make_source(), bytes_wire=1 << 20, wire_s=1.0)
        chosen = links.choose(make_source(), num_bytes=1 << 24)
        assert chosen == RAW or (chosen in allowed and mode in (chosen, "auto"))
        assert (chosen == RAW) == (not terms.usable)
        assert bool(terms.shape["num_heads"]) == bool(terms.usable)


def test_a_link_takes_what_its_own_speed_asks_for() -> None:
    links = LinkCodecs(CodecTerms("auto", CODECS, HEADS, HEAD_DIM))
    slow, fast, new = make_source(1), make_source(2), make_source(3)
    for _ in range(3):
        came(links, slow, bytes_wire=1 << 20, wire_s=1.0)
        came(links, fast, bytes_wire=1 << 30, wire_s=0.01)
    assert links.choose(slow, num_bytes=1 << 24) != RAW
    assert links.choose(fast, num_bytes=1 << 24) == RAW
    assert links.choose(new, num_bytes=1 << 24) == RAW


def test_rates_are_measured_of_every_codec() -> None:
    rates = measured_rates(HEADS, HEAD_DIM)
    assert [rate.name for rate in rates] == list(CODECS)
    assert [rate.ratio for rate in rates] == sorted(rate.ratio for rate in rates)
    assert all(rate.encode_bytes_per_s > 0 and rate.decode_bytes_per_s > 0 for rate in rates)


def test_the_bench_measures_every_codec_on_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_codecs, "ROUNDS", 1)
    monkeypatch.setattr(bench_codecs, "TOTAL_BYTES", 1 << 20)
    rows = bench_codecs.run_bench_codecs(num_heads=2, head_dim=32)
    paths = _native.codec_paths()[1:] or _native.codec_paths()
    one = [("memcpy", ""), *((codec, path) for path in paths for codec in CODECS)]
    expected = [(place, *row) for place in ("memory", "cache") for row in one]
    assert [(row.place, row.codec, row.path) for row in rows] == expected
    assert all(row.encode_gb_per_s > 0 and row.decode_gb_per_s > 0 for row in rows)


def test_blocks_that_may_have_lost_something_never_share_a_name() -> None:
    exact, lossy = (KvLayout(2, 2, 64, exact=exact) for exact in (True, False))
    assert exact.digest != lossy.digest


async def test_auto_encodes_what_comes_over_a_slow_link() -> None:
    bytes_per_s = 10e6

    def throttled(_: int, data: bytes) -> bytes:
        time.sleep(len(data) / bytes_per_s)
        return data

    terms = CodecTerms(mode="auto", allowed=("int8",), **SHAPE)
    with make_lossy_pair() as pair, Wire(pair.server.port, throttled) as wire:
        puller = NamedPuller(pair.target, DataPlane(codecs=terms), pulls_max=1)
        peer = common_pb2.PeerAddress(
            name="p", host="127.0.0.1", data_port=wire.port, uid=UID, epoch=EPOCH
        )

        async def is_encoded() -> bool:
            for block in range(BLOCKS):
                pair.target.reset(block)
            result = await puller.pull(
                peer, names=pair.names, blocks=list(range(BLOCKS)), timeout_ms=20_000
            )
            assert (result.error, result.blocks_ok) == ("", [True] * BLOCKS)
            return result.is_lossy

        assert not await is_encoded(), "nothing is known of the link yet"
        assert await is_encoded()
        assert [(link.peer, link.codec) for link in puller.links.known()] == [("p", "int8")]
        await puller.close()
