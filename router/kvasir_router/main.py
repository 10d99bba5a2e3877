"""The router as a process: runs until SIGTERM or SIGINT, then lingers and finishes its streams.

A second signal ends the lingering.
"""

import asyncio
import logging
import signal

import uvloop
from kvasir_engine.text import Tokenizer

from kvasir_router.server import RouterServer
from kvasir_router.settings import RouterSettings

log = logging.getLogger(__name__)


def run(settings: RouterSettings) -> None:
    """Serves until told to stop.

    Raises:
        OSError: a port is taken, or the model's folder lacks its tokenizer.
        ValueError: a file of the model or the key file is malformed.
    """
    text = Tokenizer.load(settings.model)
    uvloop.run(_serve(settings, text))


async def _serve(settings: RouterSettings, text: Tokenizer) -> None:
    loop, stopped, hurried = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

    def stop() -> None:
        (hurried if stopped.is_set() else stopped).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    server = RouterServer(settings, text)
    try:
        await server.start()
        await server.serve(stopped)
        log.info("stopping")
        await server.linger(hurried)
    finally:
        await server.stop()
