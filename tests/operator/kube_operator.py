"""Operator processes against the API server of a test."""

import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from kube_api import KubeApi, free_port

T = TypeVar("T")


@dataclass
class OperatorProcess:
    """One operator of a test."""

    process: subprocess.Popen[bytes]
    port: int
    name: str
    log: Path

    def metric(self, pattern: str) -> float:
        """The sum of the samples that match."""
        url = f"http://127.0.0.1:{self.port}/metrics"
        text = urllib.request.urlopen(url, timeout=5).read().decode()
        return sum(float(value) for value in re.findall(rf"^{pattern} (.+)$", text, re.MULTILINE))

    def writes(self) -> float:
        """What it wrote, the lease aside."""
        every = self.metric("kvasir_operator_api_writes_total{.*}")
        return every - self.metric('kvasir_operator_api_writes_total{kind="Lease",.*}')


@contextmanager
def operator(api: KubeApi, name: str, *more: str) -> Iterator[OperatorProcess]:
    port, log = free_port(), api.folder / f"operator-{name}.log"
    args = ("operator", "--image=kvasir:test", f"--http-port={port}", f"--identity={name}")
    command = [f"{Path(sys.executable).parent}/kvasir", *args, "--lease-namespace=default", *more]
    env = {**os.environ, "KUBECONFIG": str(api.kubeconfig), "KVASIR_LOG_FORMAT": "json"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=file)
        try:
            started = OperatorProcess(process, port, name, log)
            wait_for(f"operator {name}", lambda: started.metric("kvasir_operator_leading") >= 0)
            yield started
        finally:
            process.terminate()
            process.wait(30)


def wait_for(what: str, found: Callable[[], T], *, limit_s: float = 90) -> T:
    """Ask until the answer is true."""
    deadline_s, problem = time.monotonic() + limit_s, "not so"
    while time.monotonic() < deadline_s:
        try:
            if answer := found():
                return answer
        except (OSError, AssertionError) as error:
            problem = str(error)
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {limit_s} s: {problem}")


def is_quiet(api: KubeApi, process: OperatorProcess) -> bool:
    """Whether four reconciles of everything write nothing."""
    reconciles = "kvasir_operator_reconciles_total{.*}"
    seen, writes = process.metric(reconciles), process.writes()
    api("annotate", "msvc,dcp,pfp,kvp", "--all", "--overwrite", f"seen={time.time_ns()}")
    wait_for("four more reconciles", lambda: process.metric(reconciles) >= seen + 4)
    return process.writes() == writes
