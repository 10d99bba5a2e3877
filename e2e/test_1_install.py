"""The chart: the version before, the upgrade, its own test, and what it refuses."""

import json

import pytest
from conftest import NAMESPACE, SYSTEM_NAMESPACE, Images
from e2e_clients import start_pod
from e2e_cluster import CRDS, OURS, PARTS
from e2e_shell import Helm, Kubectl, say, wait_for

PREVIOUS = "kvasir-0.1.0.tgz"
RESTRICTED = """
apiVersion: v1
kind: Namespace
metadata: {name: %s, labels: {pod-security.kubernetes.io/enforce: restricted}}
"""
KEPT = """
apiVersion: kvasir.dev/v1alpha1
kind: ModelService
metadata: {name: kept}
spec: {model: {name: kept, source: {pvc: {claimName: nowhere}}}}
"""


@pytest.mark.timeout(2400)
def test_images_are_built_and_loaded(images: Images) -> None:
    say(f"images: {images}")


@pytest.mark.timeout(300)
def test_previous_version_is_installed(helm: Helm, kubectl: Kubectl, operator: Kubectl) -> None:
    for namespace in (NAMESPACE, SYSTEM_NAMESPACE):
        operator("apply", "-f", "-", stdin=RESTRICTED % namespace)
    helm("install", "kvasir", f"e2e/previous/{PREVIOUS}", limit_s=90)
    operator("wait", "--for=condition=Established", *CRDS, "--timeout=90s", limit_s=100)
    kubectl("apply", "-f", "-", stdin=KEPT)


@pytest.mark.timeout(600)
def test_upgrade_brings_new_crds_and_keeps_resources(
    helm: Helm, kubectl: Kubectl, operator: Kubectl
) -> None:
    before = kubectl.json("msvc/kept")["metadata"]["uid"]
    versions = {_chart_version(operator, crd) for crd in CRDS}
    helm("upgrade", "kvasir", "helm/kvasir", *helm.values, "--wait", limit_s=320)
    operator("get", "pods")
    assert versions == {"0.1.0"}
    [version] = {_chart_version(operator, crd) for crd in CRDS}
    assert version != "0.1.0"
    kubectl("wait", "--for=condition=Degraded", "msvc/kept", "--timeout=240s", limit_s=250)
    assert kubectl.json("msvc/kept")["metadata"]["uid"] == before
    kubectl.delete("msvc", "kept")
    wait_for("its children to be gone", lambda: not kubectl.names(PARTS, "-l", OURS), limit_s=180)


def _chart_version(operator: Kubectl, crd: str) -> str:
    version: str = operator.json(crd)["metadata"]["annotations"]["kvasir.dev/chart-version"]
    return version


@pytest.mark.timeout(300)
def test_chart_tests_itself(helm: Helm, operator: Kubectl) -> None:
    helm("test", "kvasir", limit_s=280)
    dashboards = operator.json("configmaps", "-l", "grafana_dashboard=1")["items"]
    titles = [json.loads(text)["title"] for d in dashboards for text in d["data"].values()]
    say(f"dashboards: {', '.join(titles)}")
    assert len(titles) >= 3
    assert operator.names("networkpolicies") == ["networkpolicy.networking.k8s.io/kvasir-operator"]


@pytest.mark.timeout(300)
def test_everything_in_the_chart_passes_the_api_server(helm: Helm, operator: Kubectl) -> None:
    """All but the Prometheus operator's objects, whose CRDs are not here."""
    helm("lint", "helm/kvasir", "--strict", *helm.values)
    release = ("kvasir", "helm/kvasir", "--skip-tests", "--kube-version", "1.29.0")
    for extra in (
        ("webhook.enabled=false", "operator.replicas=1", "crds.keep=false"),
        (f"watchNamespaces={{{SYSTEM_NAMESPACE}}}", "operator.priorityClassName=high"),
    ):
        values = (word for value in extra for word in ("--set", value))
        manifests = helm("template", *release, *helm.values, *values)
        command = ("apply", "--server-side", "--force-conflicts", "--dry-run=server", "-f", "-")
        operator(*command, "--warnings-as-errors", stdin=manifests, quiet=True)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("value", "words"),
    {
        "unknown": ("operator.replica=2", "replica"),
        "wrong type": ("operator.reconcilers=many", "reconcilers"),
        "out of range": ("operator.reconcilers=0", "reconcilers"),
    }.values(),
)
def test_wrong_value_is_refused(helm: Helm, value: str, words: str) -> None:
    command = ("upgrade", "kvasir", "helm/kvasir", "--dry-run=server", "--set", value)
    answer = helm(*command, expect_failure=True)
    assert words in answer


@pytest.mark.timeout(300)
def test_clients_start(kubectl: Kubectl, images: Images, is_kind: bool) -> None:
    start_pod(kubectl, images.kvasir, on_control_plane=is_kind)
