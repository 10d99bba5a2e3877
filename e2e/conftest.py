"""The cluster, the images and the chart that the steps work on.

KUBECONFIG          an existing cluster to use; without it, a kind cluster is made and deleted
KIND_NODE_IMAGE     image of the kind cluster's nodes
KVASIR_E2E_IMAGE, KVASIR_E2E_MODEL_IMAGE
                    images that a cluster which is not kind can pull; else both are built and loaded
KVASIR_E2E_MODEL    folder of SmolLM2; else `kvasir model get smollm2`
KEEP=1              leave the cluster up
"""

import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from e2e_shell import ROOT, CommandError, Helm, Kubectl, port_forward, run, say, show
from kvasir_cli.models.smollm2 import models_folder

CLUSTER = "kvasir-e2e"
NAMESPACE = "kvasir-e2e"
SYSTEM_NAMESPACE = "kvasir-e2e-system"
IMAGE = "kvasir:e2e"
MODEL_IMAGE = "kvasir-model-smollm2:dev"
REPORT = ROOT / ".cache" / "e2e"


@dataclass(frozen=True)
class Cluster:
    """A cluster to test on."""

    kubeconfig: str
    kind_name: str  # empty: not a kind cluster
    cache: str  # a folder for kubectl's cache


@dataclass(frozen=True)
class Images:
    """Images that the cluster has or can pull."""

    kvasir: str
    model: str


def pytest_configure(config: pytest.Config) -> None:
    """The steps build on one another: the first failure ends the run."""
    config.option.maxfail = 1


@pytest.fixture(scope="session")
def kind_name() -> str:
    """The name of the kind cluster that is there or will be made; empty: another cluster."""
    if not os.environ.get("KUBECONFIG"):
        return CLUSTER
    context = run("kubectl", "config", "current-context").strip()
    return context.removeprefix("kind-") if context.startswith("kind-") else ""


@pytest.fixture(scope="session")
def builds(kind_name: str) -> Iterator[tuple[Future[None], Future[None]] | None]:
    """Kvasir's image and the model's, on their way while the cluster comes up; None: given."""
    given = (os.environ.get("KVASIR_E2E_IMAGE"), os.environ.get("KVASIR_E2E_MODEL_IMAGE"))
    if all(given):
        yield None
        return
    if not kind_name:
        raise CommandError("not a kind cluster: set KVASIR_E2E_IMAGE and KVASIR_E2E_MODEL_IMAGE")
    with ThreadPoolExecutor() as pool:
        yield pool.submit(_build_image), pool.submit(_build_model_image)


def _build_image() -> None:
    _build("-t", IMAGE, str(ROOT), limit_s=1500)


def _build_model_image() -> None:
    model = os.environ.get("KVASIR_E2E_MODEL") or _smollm2()
    _build("-t", MODEL_IMAGE, "-f", str(ROOT / "e2e/model.Dockerfile"), model, limit_s=300)


def _build(*args: str, limit_s: float) -> None:
    plain = {"DOCKER_BUILDKIT": os.environ.get("DOCKER_BUILDKIT", "0")}
    run("docker", "build", "-q", *args, limit_s=limit_s, env=plain)


@pytest.fixture(scope="session")
def cluster(
    kind_name: str, builds: object, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """An existing cluster, or a kind cluster that is deleted afterwards."""
    given = os.environ.get("KUBECONFIG", "")
    for tool in ("kubectl", "helm", *(() if given else ("kind", "docker"))):
        assert shutil.which(tool), f"{tool} is not on the PATH: install it or see CONTRIBUTING.md"
    folder = tmp_path_factory.mktemp("cluster")
    cache = str(folder / "cache")
    if given:
        yield Cluster(given, kind_name, cache)
        return
    kubeconfig = str(folder / "kubeconfig")
    node_image = os.environ.get("KIND_NODE_IMAGE", "")
    run("kind", "delete", "cluster", "--name", CLUSTER, limit_s=300)
    command = ["kind", "create", "cluster", "--name", CLUSTER, "--wait", "180s"]
    command += ["--config", str(ROOT / "e2e/kind.yaml"), "--kubeconfig", kubeconfig]
    run(*command, *(["--image", node_image] if node_image else []), limit_s=600)
    yield Cluster(kubeconfig, CLUSTER, cache)
    if os.environ.get("KEEP"):
        say(f"the cluster stays: kind get kubeconfig --name {CLUSTER}")
        return
    run("kind", "delete", "cluster", "--name", CLUSTER, limit_s=300)


@pytest.fixture(scope="session")
def images(cluster: Cluster, builds: tuple[Future[None], Future[None]] | None) -> Images:
    """Kvasir's image and the model's, loaded into a kind cluster unless they are given."""
    if builds is None:
        return Images(os.environ["KVASIR_E2E_IMAGE"], os.environ["KVASIR_E2E_MODEL_IMAGE"])
    image, model = builds
    model.result()
    nodes = run("kind", "get", "nodes", "--name", cluster.kind_name, quiet=True).split()
    workers = [node for node in nodes if not node.endswith("-control-plane")] or nodes
    _load(cluster, MODEL_IMAGE, "--nodes", ",".join(workers))
    say("waiting for the image (3 to 6 minutes the first time)")
    image.result()
    _load(cluster, IMAGE)
    return Images(IMAGE, MODEL_IMAGE)


def _load(cluster: Cluster, *args: str) -> None:
    run("kind", "load", "docker-image", *args, "--name", cluster.kind_name, limit_s=900)


def _smollm2() -> str:
    folder = str(models_folder() / "smollm2")  # the demo's own
    kvasir = str(Path(sys.executable).parent / "kvasir")
    run(kvasir, "model", "get", "smollm2", folder, limit_s=900)
    return folder


@pytest.fixture(scope="session")
def kubectl(cluster: Cluster) -> Kubectl:
    """kubectl in the namespace of the tests."""
    return Kubectl(cluster.kubeconfig, NAMESPACE, cache=cluster.cache)


@pytest.fixture(scope="session")
def operator(cluster: Cluster) -> Kubectl:
    """kubectl in the operator's namespace."""
    return Kubectl(cluster.kubeconfig, SYSTEM_NAMESPACE, cache=cluster.cache)


@pytest.fixture(scope="session")
def helm(cluster: Cluster, images: Images) -> Helm:
    """helm in the operator's namespace, with the values that the suite installs the chart with."""
    repository, tag = images.kvasir.rsplit(":", 1)
    values = (
        *(f"image.repository={repository}", f"image.tag={tag}"),
        *("operator.replicas=2", "networkPolicy.enabled=true", "dashboards.enabled=true"),
        "webhook.enabled=true",
    )
    return Helm(cluster.kubeconfig, SYSTEM_NAMESPACE, values=values)


@pytest.fixture(scope="session")
def is_kind(cluster: Cluster) -> bool:
    """Whether the cluster is one of kind: its nodes can be stopped."""
    return bool(cluster.kind_name)


@pytest.fixture
def router(kubectl: Kubectl) -> Iterator[str]:
    """The router's Service on this machine."""
    with port_forward(kubectl, "service/smollm2-router", 8000) as url:
        yield url


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """When a step fails, what the cluster has to say is collected."""
    outcome: Any = yield
    report = outcome.get_result()
    clients = [getattr(item, "funcargs", {}).get(name) for name in ("kubectl", "operator")]
    if report.failed and call.when == "call" and clients[0] is not None:
        say(f"{item.name} FAILED: {call.excinfo.value if call.excinfo else ''}")
        for client in clients:
            if client is not None:
                collect(client)


def collect(kubectl: Kubectl) -> None:
    """Logs, events and descriptions of one namespace: shortened here, whole in REPORT."""
    REPORT.mkdir(parents=True, exist_ok=True)
    kinds = "msvc,pfp,dcp,kvp,pods,statefulsets,deployments,services"
    asked = {
        "objects": ("get", kinds, "-o", "wide"),
        "events": ("get", "events", "--sort-by=.lastTimestamp"),
        "describe": ("describe", kinds),
    }
    try:
        pods = kubectl.names("pods")
    except CommandError as error:
        say(f"the cluster says nothing: {error}")
        return
    for pod in pods:
        name = pod.removeprefix("pod/")
        asked[f"log-{name}"] = ("logs", name, "--all-containers", "--tail=200")
        asked[f"log-before-{name}"] = ("logs", name, "--previous", "--tail=100")
    for name, command in asked.items():
        try:
            text = kubectl(*command, quiet=True)
        except CommandError as error:
            text = str(error)
        path = REPORT / f"{kubectl.namespace}-{name}.txt"
        path.write_text(text)
        if name in ("objects", "events") or name.startswith("log-"):
            say(f"--- {path}")
            show("\n".join(text.splitlines()[-30:]))
