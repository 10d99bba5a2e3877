"""Clients in a pod of the cluster: through the Service, as a user's application talks to it.

A port-forward ends with the one pod that it goes to; these clients find whichever router is there.
"""

import json
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from e2e_shell import Kubectl, say
from kvasir_cli.demo import SYSTEM

POD = "e2e-clients"
SCRIPTS = ("e2e_chat.py", "e2e_shell.py")
END_LIMIT_S = 150
UNCACHED = "This is talk {name}. " + SYSTEM  # no worker has the beginning of such a prompt
CONTROL_PLANE = "node-role.kubernetes.io/control-plane"


def start_pod(kubectl: Kubectl, image: str, *, on_control_plane: bool) -> None:
    """Make the pod that the clients run in; on the control plane no lost worker node takes it."""
    folder = Path(__file__).parent
    files = (f"--from-file={folder / script}" for script in SCRIPTS)
    made = kubectl("create", "configmap", POD, *files, "--dry-run=client", "-o=yaml", quiet=True)
    kubectl("apply", "-f", "-", stdin=made)
    spec: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 0,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 10001,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": "clients",
                "image": image,
                "command": ["sleep", "infinity"],
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                },
                "volumeMounts": [{"name": "scripts", "mountPath": "/clients"}],
            }
        ],
        "volumes": [{"name": "scripts", "configMap": {"name": POD}}],
    }
    if on_control_plane:
        spec["nodeSelector"] = {CONTROL_PLANE: ""}
        spec["tolerations"] = [{"key": CONTROL_PLANE, "operator": "Exists"}]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": POD}, "spec": spec}
    kubectl("apply", "-f", "-", stdin=json.dumps(pod))
    kubectl("wait", "--for=condition=Ready", f"pod/{POD}", "--timeout=240s", limit_s=250)


class Clients:
    """Clients that each ask one thing after another while the block runs; counts failures.

    `system` is the beginning of every prompt, with {name} for something that none had before.
    """

    def __init__(
        self,
        kubectl: Kubectl,
        *,
        num_clients: int,
        system: str = "",
        limit_s: float = 120,
        **params: Any,
    ) -> None:
        load = {
            "url": "http://smollm2-router:8000",
            "num_clients": num_clients,
            "system": system,
            "limit_s": limit_s,
            "params": params,
        }
        self._command = (
            *(*kubectl.prefix, "exec", "-i", POD, "--"),
            *("python3", "/clients/e2e_chat.py", json.dumps(load)),
        )
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._is_ended = False
        self.num_done = 0
        self.failures: list[str] = []

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._lock:
                if line.strip() == "done":
                    self.num_done += 1
                elif line.strip() == "ended":
                    self._is_ended = True
                else:
                    self.failures.append(line.strip())

    def __enter__(self) -> "Clients":
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # tells the clients to end
        self._reader.join(END_LIMIT_S)
        self._process.terminate()
        self._process.wait(10)
        if self._process.stdout is not None:
            self._process.stdout.close()
        if not self._is_ended:
            self.failures.append("the clients did not end in order")
        say(f"load: {self.num_done} requests done, {len(self.failures)} failed")
        for failure in self.failures[:8]:
            say(f"  failed: {failure}")

    def has_done(self, num_more: int) -> Callable[[], bool]:
        """A probe: this many more requests than now are done, or one has failed."""
        wanted = self.num_done + num_more
        return lambda: self.num_done >= wanted or bool(self.failures)
