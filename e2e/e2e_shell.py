"""Commands of the suite: each has a time limit, is printed, and fails with its output."""

import http.client
import json
import os
import re
import select
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

POLL_INTERVAL_S = 0.5
OUTPUT_LINES_MAX = 60
PORT_FORWARD_LIMIT_S = 60
UNREACHED_LIMIT_S = 120
DELETE_LIMIT_S = 300
UNREACHED = (  # what a busy API server or etcd says, or its client: asked again, nothing changes
    "did you specify the right host or port?",
    "TLS handshake timeout",
    "i/o timeout",
    "connection refused",
    "connection reset by peer",
    "client connection lost",
    "unexpected EOF",
    "context deadline exceeded",
    "Client.Timeout exceeded",
    "etcdserver: ",
    "the server is currently unable to handle the request",
    "the server was unable to return a response in the time allotted",
    "too many requests",
)
PASSING_ERRORS = (OSError, http.client.HTTPException, LookupError)  # a field yet to be written
ROOT = Path(__file__).parents[1]


class CommandError(AssertionError):
    """A command failed or took too long; the message has its output."""


def say(text: str) -> None:
    """One line of progress, with the time."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def show(text: str) -> None:
    """Output of a command, shortened."""
    lines = text.rstrip().splitlines()
    for line in lines[:OUTPUT_LINES_MAX]:
        print(f"          {line}", flush=True)
    if len(lines) > OUTPUT_LINES_MAX:
        print(f"          ... {len(lines) - OUTPUT_LINES_MAX} more lines", flush=True)


def run(
    *command: str,
    limit_s: float = 60,
    stdin: str | None = None,
    expect_failure: bool = False,
    quiet: bool = False,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Run a command to its end; standard output, or of an expected failure also the errors."""
    if not quiet:
        say("$ " + " ".join(command))
    try:
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
            env={**os.environ, **(env or {})},
            cwd=cwd,
        )
    except subprocess.TimeoutExpired as error:
        raise CommandError(f"{command[0]}: no end after {limit_s:.0f} s: {command}") from error
    if (done.returncode != 0) != expect_failure:
        text = done.stdout + done.stderr
        raise CommandError(f"status {done.returncode} of {' '.join(command)}\n{text}")
    text = done.stdout + (done.stderr if expect_failure else "")
    if not quiet:
        show(text)
    return text


class Kubectl:
    """kubectl with one kubeconfig, one namespace and a cache of its own.

    kubectl keeps for ten minutes what a server offers: a cache from before the installation does
    not know the short names of the CRDs.
    """

    def __init__(self, kubeconfig: str, namespace: str, *, cache: str) -> None:
        self.kubeconfig = kubeconfig
        self.namespace = namespace
        self.cache = cache

    @property
    def prefix(self) -> tuple[str, ...]:
        """The words before every command."""
        where = ("--kubeconfig", self.kubeconfig, "--cache-dir", self.cache)
        return ("kubectl", *where, "-n", self.namespace)

    def __call__(self, *args: str, **options: Any) -> str:
        """Run one command."""
        if not options.get("quiet"):
            say("$ kubectl " + " ".join(args))
        text = self._run_when_reached(*args, **{**options, "quiet": True})
        if not options.get("quiet"):
            show(text)
        return text

    def _run_when_reached(self, *args: str, **options: Any) -> str:
        """A busy machine may keep the API server from answering for a while.

        Commands that may be repeated are all that the suite gives: `apply`, never `create`.
        """
        until_s = time.monotonic() + UNREACHED_LIMIT_S
        while True:
            error: CommandError | None = None
            try:
                said = run(*self.prefix, *args, **options)
            except CommandError as failure:
                said, error = str(failure), failure
            has_failed = error is not None or options.get("expect_failure")
            is_unreached = has_failed and any(word in said for word in UNREACHED)
            if time.monotonic() > until_s or not is_unreached:
                if error is not None:
                    raise error
                return said
            time.sleep(POLL_INTERVAL_S)

    def delete(self, *args: str) -> str:
        """Delete, and wait until it is done: finalizers may take their time."""
        return self("delete", "--ignore-not-found", *args, limit_s=DELETE_LIMIT_S)

    def json(self, *args: str) -> Any:
        """The output of a `get` as JSON; not printed."""
        return json.loads(self("get", *args, "-o", "json", quiet=True))

    def condition(self, what: str, kind: str) -> dict[str, str]:
        """One condition of an object; empty while it is not there."""
        conditions = self.json(what).get("status", {}).get("conditions", [])
        return next((c for c in conditions if c["type"] == kind), {})

    def names(self, *args: str) -> list[str]:
        """The objects that a `get` finds."""
        return self("get", *args, "-o", "name", "--ignore-not-found", quiet=True).split()


def wait_for(what: str, probe: Callable[[], Any], *, limit_s: float, quiet: bool = False) -> Any:
    """Ask until the answer is true; tells every 10 s that it still waits.

    A question that fails is asked again: an API server on a busy machine does not answer always,
    and a status may be yet to be written.
    """
    if not quiet:
        say(f"waiting for {what}")
    started_s = time.monotonic()
    told_s = started_s
    while True:
        answer, trouble = None, ""
        try:
            answer = probe()
        except (CommandError, *PASSING_ERRORS) as error:
            trouble = f"; the last question failed: {type(error).__name__} {error}"
        now_s = time.monotonic()
        if answer:
            if not quiet:
                say(f"{what}: after {now_s - started_s:.1f} s")
            return answer
        if now_s - started_s > limit_s:
            raise CommandError(f"waited {limit_s:.0f} s for {what}{trouble}")
        if now_s - told_s > 10:
            told_s = now_s
            say(f"  still waiting for {what} ({now_s - started_s:.0f} s){trouble}")
        time.sleep(POLL_INTERVAL_S)


@contextmanager
def port_forward(kubectl: Kubectl, target: str, port: int) -> Iterator[str]:
    """The base URL of a Service, Deployment or pod on this machine."""
    until_s = time.monotonic() + PORT_FORWARD_LIMIT_S
    while True:
        with _started(*kubectl.prefix, "port-forward", target, f":{port}") as process:
            assert process.stdout is not None
            is_told, _, _ = select.select([process.stdout], [], [], PORT_FORWARD_LIMIT_S)
            line = process.stdout.readline() if is_told else "no word from it"
            if "Forwarding" in line:  # "Forwarding from 127.0.0.1:41234 -> 8000"
                local = line.split("127.0.0.1:")[1].split(" ")[0]
                yield f"http://127.0.0.1:{local}"
                return
        if time.monotonic() > until_s:
            raise CommandError(f"port-forward to {target}: {line}")
        time.sleep(POLL_INTERVAL_S)


@contextmanager
def _started(*command: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def followed_log(kubectl: Kubectl, pod: str, folder: Path) -> Iterator[Path]:
    """A file that a pod's log is written to as it comes, the last line first; outlives the pod."""
    path = folder / f"{pod}.log"
    with path.open("w") as log:
        command = (*kubectl.prefix, "logs", "--follow", "--tail=1", pod)
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_for(f"the log of {pod}", lambda: path.stat().st_size > 0, limit_s=60)
            yield path
        finally:
            process.terminate()
            process.wait(10)


def metric(url: str, name: str, **labels: str) -> float:
    """One metric of a process, summed over the labels that are not given; 0 if it is not there.

    A value that begins with "!" is one that the label must not have.
    """
    text = urllib.request.urlopen(f"{url}/metrics", timeout=20).read().decode()
    total = 0.0
    for found in re.finditer(rf"^{name}({{.*}})? (.+)$", text, re.MULTILINE):
        total += float(found[2]) * all(
            (f'{key}="{value.removeprefix("!")}"' in (found[1] or "")) != value.startswith("!")
            for key, value in labels.items()
        )
    return total


class Helm:
    """helm with one kubeconfig and one namespace, run in the project's root."""

    def __init__(self, kubeconfig: str, namespace: str, *, values: Sequence[str]) -> None:
        self.values = tuple(word for value in values for word in ("--set", value))
        self._where = ("--kubeconfig", kubeconfig, "--namespace", namespace)

    def __call__(self, *args: str, **options: Any) -> str:
        """Run one command; the notes of the chart are not printed."""
        say("$ helm " + " ".join(args))
        return run("helm", *args, *self._where, quiet=True, cwd=ROOT, **options)
