"""gRPC channels to peers: made on first use, kept while in use, at most CHANNELS_MAX."""

import asyncio
from collections import OrderedDict

import grpc.aio
from kvasir_kvstore.peers import join_target
from kvasir_proto.links import Links
from kvasir_proto.v1 import common_pb2, worker_pb2_grpc

CHANNELS_MAX = 256
MESSAGE_BYTES_MAX = 16 << 20
"""A prompt of a million tokens is about 3 MB."""
CHANNEL_OPTIONS = (
    ("grpc.enable_http_proxy", 0),  # peers are near, whatever the environment says
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),  # a restarted peer is found again at once
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
)


class Peers:
    """Stubs of other workers, by address. `close_grace_s`: the longest call."""

    def __init__(self, links: Links, *, close_grace_s: float) -> None:
        self._links = links
        self._close_grace_s = close_grace_s
        self._channels: OrderedDict[tuple[str, int], grpc.aio.Channel] = OrderedDict()
        self._closing: set[asyncio.Task[None]] = set()

    def worker(self, address: common_pb2.PeerAddress) -> "worker_pb2_grpc.WorkerAsyncStub":
        """The stub of a worker; calls fail fast if nobody listens there."""
        target = join_target(address.host, address.grpc_port)
        key = (target, self._links.version)  # those of earlier certificates fall into disuse
        channel = self._channels.pop(key, None)
        if channel is None:
            channel = self._links.channel(target, CHANNEL_OPTIONS)
        self._channels[key] = channel
        if len(self._channels) > CHANNELS_MAX:
            _, oldest = self._channels.popitem(last=False)
            closing = asyncio.create_task(oldest.close(self._close_grace_s))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        return worker_pb2_grpc.WorkerStub(channel)

    async def close(self) -> None:
        """Closes every channel; calls in progress are cancelled."""
        for task in list(self._closing):
            task.cancel()
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()
