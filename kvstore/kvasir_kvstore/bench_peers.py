"""Transfer libraries beside which the data plane is measured, each in a process of its own.

Decides where a library's virtual environment is (`~/.cache/kvasir/peers/NAME`, or
KVASIR_PEER_NAME). What it runs is a program in `bench/peers`; bench/README.md says how each is set
up. Both ends of a peer run in its process, as in the other paths, and none checks what it moves.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path as FilePath
from typing import IO

PEERS = ("nixl", "mooncake")
PROGRAMS = FilePath("bench/peers")
"""In a checkout of Kvasir, from where peers are measured."""

Move = Callable[[], None]
Rounds = Callable[[int], tuple[list[float], float]]
"""So many moves of a block: the time of each and the CPU time of all, in seconds."""
Path = Callable[[int], AbstractContextManager[Rounds]]
"""Of blocks of so many bytes."""


def in_process(move: Move) -> Rounds:
    """Rounds of moves that this process makes."""

    def run(num_moves: int) -> tuple[list[float], float]:
        move()  # connects, touches the memory, wakes the caches
        times_s = []
        cpu_s = time.process_time()
        for _ in range(num_moves):
            start_s = time.perf_counter()
            move()
            times_s.append(time.perf_counter() - start_s)
        return times_s, time.process_time() - cpu_s

    return run


def make_peer_paths(report: Callable[[str], None]) -> dict[str, Path]:
    """The paths of those that are set up; `report` gets a line for each that is not."""
    paths: dict[str, Path] = {}
    for name in PEERS:
        python, program = _python(name), PROGRAMS / f"{name}_read.py"
        if not program.is_file():
            report(f"{name:13} is not measured: {program} does not exist here")
        elif not python.is_file():
            report(f"{name:13} is not measured: {python} does not exist (bench/README.md)")
        else:
            paths[name] = partial(_peer, name, [str(python), str(program)])
    return paths


def _python(name: str) -> FilePath:
    usual = FilePath.home() / ".cache" / "kvasir" / "peers" / name
    folder = FilePath(os.environ.get(f"KVASIR_PEER_{name.upper()}", usual))
    return folder / "bin" / "python"


@contextmanager
def _peer(name: str, command: list[str], size: int) -> Iterator[Rounds]:
    process = subprocess.Popen(
        [*command, str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    requests, answers = process.stdin, process.stdout
    assert requests is not None, "a pipe"
    assert answers is not None, "a pipe"

    def run(num_moves: int) -> tuple[list[float], float]:
        print(num_moves, file=requests, flush=True)
        answer = json.loads(_answer(name, answers))
        return answer["times_s"], answer["cpu_s"]

    try:
        _answer(name, answers)  # it is ready
        yield run
    finally:
        process.kill()
        process.wait()
        requests.close()
        answers.close()


def _answer(name: str, answers: IO[str]) -> str:
    line = answers.readline()
    if not line:
        raise ConnectionError(f"{name} failed: run its program in bench/peers to see why")
    return line
