"""A real redis-server for the tests of the index."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from kvstore_builders import free_port, wait_until


class RedisServer:
    """A redis-server process on a port of its own, that can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        binary = shutil.which("redis-server")
        if binary is None:
            pytest.fail(
                "these tests need a real redis-server: apt-get install redis-server "
                "(`make test` does so where it may)"
            )
        self.binary = binary
        self._folder = folder
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, more: dict[str, str] | None = None) -> None:
        log = self._folder / "redis.log"
        options = {"port": self.port, "bind": "127.0.0.1", "save": "", "appendonly": "no"}
        options |= more or {}
        flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [self.binary, *flags], cwd=self._folder, stdout=output, stderr=output
            )
        wait_until(lambda: b"Ready to accept connections" in log.read_bytes(), "redis-server")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One for all tests that leave it running."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """One that the test may stop; not started."""
    server = RedisServer(tmp_path)
    yield server
    server.stop()
