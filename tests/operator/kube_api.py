"""A real API server without nodes: etcd, kube-apiserver and the controllers, for tests.

KUBEBUILDER_ASSETS names a folder with the programs etcd, kube-apiserver, kube-controller-manager
and kubectl; `make test-api` takes them out of the image of kind's nodes. No kubelet runs: tests
write the status of pods.
"""

import json
import os
import signal
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

ASSETS = os.environ.get("KUBEBUILDER_ASSETS", "")
PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager", "kubectl")
CONTROLLERS = (
    "replicaset-controller,statefulset-controller,deployment-controller,"
    "garbage-collector-controller,namespace-controller,serviceaccount-controller,"
    "disruption-controller,horizontal-pod-autoscaler-controller"
)
START_LIMIT_S = 90

needs_kube_api = pytest.mark.skipif(
    not all((Path(ASSETS) / program).exists() for program in PROGRAMS),
    reason=f"make test-api runs it: it takes {', '.join(PROGRAMS)} (KUBEBUILDER_ASSETS)",
)


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def program(folder: Path, name: str, *args: str) -> Iterator[subprocess.Popen[bytes]]:
    """One program with its log in `folder`; ended afterwards."""
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen([f"{ASSETS}/{name}", *args], stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class KubeApi:
    """kubectl against the API server."""

    def __init__(self, folder: Path, kubeconfig: Path) -> None:
        self.folder = folder
        self.kubeconfig = kubeconfig

    def __call__(self, *args: str, stdin: str = "", check: bool = True) -> str:
        """kubectl's output; what it complains about if it fails and `check` is not set."""
        done = subprocess.run(
            [f"{ASSETS}/kubectl", f"--kubeconfig={self.kubeconfig}", *args],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "KUBECACHEDIR": str(self.folder / "cache")},
        )
        if check:
            assert done.returncode == 0, done.stderr
            return done.stdout
        return done.stdout + done.stderr

    def json(self, *args: str) -> Any:
        """The answer of `kubectl get` as JSON."""
        return json.loads(self("get", *args, "-o", "json"))

    def apply(self, *objects: Any, check: bool = True) -> str:
        """Apply these objects."""
        return self("apply", "-f", "-", stdin=yaml.safe_dump_all(objects), check=check)

    def patch_status(self, name: str, status: Any) -> None:
        """Write a status as its controller or kubelet would."""
        patch = json.dumps({"status": status})
        self("patch", name, "--subresource=status", "--type=merge", "-p", patch)


@contextmanager
def kube_api(folder: Path, *, controllers: str = CONTROLLERS) -> Iterator[KubeApi]:
    """A cluster of etcd, API server and these controllers (if any), with Kvasir's CRDs."""
    api_port = free_port()
    server = f"https://127.0.0.1:{api_port}"
    kubeconfig = _kubeconfig(folder, server)
    key = folder / "sa.key"
    openssl = ("openssl", "genrsa", "-out", str(key), "2048")
    subprocess.run(openssl, check=True, capture_output=True)
    (folder / "tokens").write_text("admin,admin,admin,system:masters\n")
    with ExitStack() as stack:
        etcd_url = f"http://127.0.0.1:{free_port()}"
        etcd = _etcd_args(folder, etcd_url)
        stack.enter_context(program(folder, "etcd", *etcd))
        server_args = _server_args(folder, key, api_port)
        stack.enter_context(
            program(folder, "kube-apiserver", f"--etcd-servers={etcd_url}", *server_args)
        )
        _wait_until_ready(folder, server)
        if controllers:
            args = _controller_args(folder, key, kubeconfig, controllers)
            stack.enter_context(program(folder, "kube-controller-manager", *args))
        api = KubeApi(folder, kubeconfig)
        api("apply", "--server-side", "-f", str(Path(__file__).parents[2] / "crds"))
        api("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
        yield api


def _kubeconfig(folder: Path, server: str) -> Path:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [
            {"name": "c", "cluster": {"server": server, "insecure-skip-tls-verify": True}}
        ],
        "users": [{"name": "u", "user": {"token": "admin"}}],
    }
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    return path


def _etcd_args(folder: Path, url: str) -> tuple[str, ...]:
    return (
        f"--data-dir={folder}/etcd",
        f"--listen-client-urls={url}",
        f"--advertise-client-urls={url}",
        f"--listen-peer-urls=http://127.0.0.1:{free_port()}",
        "--unsafe-no-fsync",
    )


def _server_args(folder: Path, key: Path, port: int) -> tuple[str, ...]:
    return (
        f"--secure-port={port}",
        "--bind-address=127.0.0.1",
        f"--cert-dir={folder}/certs",
        f"--token-auth-file={folder}/tokens",
        "--authorization-mode=RBAC",
        "--service-cluster-ip-range=10.0.0.0/24",
        f"--service-account-key-file={key}",
        f"--service-account-signing-key-file={key}",
        "--service-account-issuer=https://kubernetes.default.svc",
        "--disable-admission-plugins=ServiceAccount",
        "--feature-gates=ImageVolume=true",
    )


def _controller_args(
    folder: Path, key: Path, kubeconfig: Path, controllers: str
) -> tuple[str, ...]:
    return (
        f"--kubeconfig={kubeconfig}",
        f"--authentication-kubeconfig={kubeconfig}",
        f"--authorization-kubeconfig={kubeconfig}",
        f"--controllers={controllers}",
        "--leader-elect=false",
        f"--secure-port={free_port()}",
        f"--cert-dir={folder}/certs-kcm",
        f"--service-account-private-key-file={key}",
        "--use-service-account-credentials=false",
    )


def _wait_until_ready(folder: Path, server: str) -> None:
    context = ssl._create_unverified_context()
    request = urllib.request.Request(f"{server}/readyz", headers={"Authorization": "Bearer admin"})
    deadline_s, problem = time.monotonic() + START_LIMIT_S, ""
    while time.monotonic() < deadline_s:
        try:
            with urllib.request.urlopen(request, timeout=5, context=context):
                return
        except OSError as error:
            problem = str(error)
        time.sleep(0.2)
    log = (folder / "kube-apiserver.log").read_text()[-2000:]
    raise AssertionError(f"no API server: {problem}\n{log}")
