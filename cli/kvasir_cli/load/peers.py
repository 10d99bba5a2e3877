"""Other engines, each in a process of its own virtual environment, measured in turn with Kvasir.

Decides where that environment is (`~/.cache/kvasir/peers/NAME`, or KVASIR_PEER_NAME) and how the
process is asked: a line per case in, its seconds out. What a peer runs is its program's matter
(`bench/peers`); bench/README.md says how to set each up.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from kvasir_engine.bench import Case, Engine, EngineBenchSettings
from kvasir_engine.formats import KvFormat, WeightFormat

from kvasir_cli.errors import CommandError

PROGRAMS = Path("bench/peers")
"""In a checkout of Kvasir, from where peers are measured."""
KV_FORMATS: dict[str, tuple[KvFormat, ...]] = {
    "openvino": ("bf16", "int8"),
    "llama.cpp": ("bf16",),
    "vllm-cpu": ("bf16",),
}
"""What each is measured with; asked for another, it keeps to the first."""
WEIGHT_FORMATS: dict[str, tuple[WeightFormat, ...]] = {
    "openvino": ("bf16", "int8", "int4"),
    "llama.cpp": ("bf16", "int8", "int4"),
    "vllm-cpu": ("bf16", "int8"),
}


class Peer:
    """A running peer."""

    def __init__(
        self, name: str, process: subprocess.Popen[str], weights: WeightFormat, kv: KvFormat
    ) -> None:
        self.name = name
        self.weights = weights
        self.kv = kv
        self._process = process

    def seconds(self, case: Case) -> float:
        """Runs it once."""
        step = case.step
        return float(self._ask(f"{step.num_sequences} {step.start} {step.end} {case.num_steps}"))

    def rss_mb(self) -> int:
        """Largest memory of its process so far."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        return int(fields["VmHWM"].split()[0]) // 1024

    def _ask(self, line: str) -> str:
        source, target = self._pipes()
        target.write(line + "\n")
        target.flush()
        return self.answer(source)

    def answer(self, source: IO[str] | None = None) -> str:
        """The next line that it says."""
        line = (source or self._pipes()[0]).readline().strip()
        if not line:
            raise CommandError(f"{self.name} stopped with status {self._process.wait()}")
        return line

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        source, target = self._process.stdout, self._process.stdin
        assert source is not None, "a pipe"
        assert target is not None, "a pipe"
        return source, target


@contextmanager
def running_peers(
    names: Sequence[str], settings: EngineBenchSettings
) -> Iterator[tuple[Engine, ...]]:
    """The named peers, their models loaded.

    Raises:
        CommandError: a peer is not set up, or its program fails.
    """
    with ExitStack() as stack:
        yield tuple(stack.enter_context(_running(name, settings)) for name in names)


@contextmanager
def _running(name: str, settings: EngineBenchSettings) -> Iterator[Peer]:
    program = PROGRAMS / f"{_identifier(name)}.py"
    if not program.is_file():
        raise CommandError(f"{program} does not exist: measure peers in a checkout of Kvasir")
    if settings.weights not in WEIGHT_FORMATS[name]:
        formats = " or ".join(WEIGHT_FORMATS[name])
        raise CommandError(f"{name} is measured with {formats} weights, not {settings.weights}")
    known = KV_FORMATS[name]
    kv = settings.kv if settings.kv in known else known[0]
    arguments = [settings.model_dir, settings.weights, kv, settings.num_threads]
    process = subprocess.Popen(
        [peer_python(name), program, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=sys.stderr,
        text=True,
    )
    try:
        peer = Peer(name, process, settings.weights, kv)
        peer.answer()  # it has loaded
        yield peer
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def peer_python(name: str) -> Path:
    """The interpreter of the peer's virtual environment. CommandError if there is none."""
    variable = "KVASIR_PEER_" + _identifier(name).upper()
    usual = Path.home() / ".cache" / "kvasir" / "peers" / name
    folder = Path(os.environ.get(variable, usual))
    python = folder / "bin" / "python"
    if not python.is_file():
        raise CommandError(
            f"{name} is not set up: {python} does not exist; bench/README.md says how ({variable} "
            "names another folder)"
        )
    return python


def _identifier(name: str) -> str:
    return name.replace(".", "_").replace("-", "_")
