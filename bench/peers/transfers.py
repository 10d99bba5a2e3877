"""What the transfer libraries have in common as peers of `kvasir bench kv`.

A program is run with the size of a block, in the library's virtual environment; both ends are in
its process. It says "ready", then answers each line, a number of moves, with their times and the
CPU seconds of the process.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TextIO


def serve(moving: Callable[[int], AbstractContextManager[Callable[[], None]]]) -> None:
    """Serve rounds until the input ends; what the library prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with moving(int(sys.argv[1])) as move:
        print("ready", file=answers, flush=True)
        for line in sys.stdin:
            _run(move, int(line), answers)
        os._exit(0)  # the libraries' threads may not end by themselves


def _run(move: Callable[[], None], num_moves: int, answers: TextIO) -> None:
    move()
    times_s = []
    cpu_s = time.process_time()
    for _ in range(num_moves):
        start_s = time.perf_counter()
        move()
        times_s.append(time.perf_counter() - start_s)
    result = {"times_s": times_s, "cpu_s": time.process_time() - cpu_s}
    print(json.dumps(result), file=answers, flush=True)
