"""Kvasir on a real cluster, from helm install to nothing left. The steps build on one another."""

import json
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import NAMESPACE, ROOT, SYSTEM_NAMESPACE, Cluster, Images
from e2e_chat import QUESTION, Load, Message, chat, system, tell, user
from e2e_shell import Kubectl, followed_log, metric, port_forward, run, say, wait_for
from kvasir_cli.demo import SYSTEM

SERVICE = "msvc/smollm2"
DECODE = "dcp/smollm2-decode"
KINDS = "msvc,pfp,dcp,kvp"
PARTS = "deployments,statefulsets,services,pods,poddisruptionbudgets,serviceaccounts"
CRDS = tuple(
    f"crd/{plural}.kvasir.dev"
    for plural in ("modelservices", "prefillpools", "decodepools", "kvcachepools")
)
DRAINS = "kvasir_operator_drains_total"
OPERATOR = "app.kubernetes.io/name=kvasir-operator"
OURS = "app.kubernetes.io/managed-by=kvasir-operator"

SOURCE = "{hostPath: {path: /nowhere}}"
CR = """
apiVersion: kvasir.dev/v1alpha1
kind: ModelService
metadata: {name: bad}
spec:
  model: {name: bad, source: %s}
  %s
"""


@pytest.fixture
def router(kubectl: Kubectl) -> Iterator[str]:
    """The router's Service on this machine."""
    with port_forward(kubectl, "service/smollm2-router", 8000) as url:
        yield url


def operator_metric(operator: Kubectl, name: str, **labels: str) -> float:
    """One counter of the operator, summed over its pods and the labels that are not given."""
    pods = operator.json("pods", "-l", OPERATOR)["items"]
    total = 0.0
    for pod in pods:
        with port_forward(operator, f"pod/{pod['metadata']['name']}", 8080) as url:
            total += metric(url, name, **labels)
    return total


def ready_pods(kubectl: Kubectl, role: str) -> list[str]:
    """Names of the pods of a role that are ready and not on their way out."""
    pods = kubectl.json("pods", "-l", f"kvasir.dev/role={role}")["items"]
    return sorted(pod["metadata"]["name"] for pod in pods if _is_ready(pod))


def pod_uids(kubectl: Kubectl, *roles: str) -> dict[str, str]:
    """The UIDs of the ready pods of these roles, by name."""
    pods = kubectl.json("pods", "-l", f"kvasir.dev/role in ({','.join(roles)})")["items"]
    return {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in pods if _is_ready(pod)}


def _is_ready(pod: dict[str, Any]) -> bool:
    conditions = pod.get("status", {}).get("conditions", [])
    is_ready = any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
    return is_ready and "deletionTimestamp" not in pod["metadata"]


def wait_until_replaced(
    kubectl: Kubectl, before: dict[str, str], *names: str, limit_s: float
) -> None:
    """Wait until other pods under these names are ready and the service is settled."""
    roles = ("router", "prefill", "decode", "kv")

    def is_replaced() -> bool:
        now = pod_uids(kubectl, *roles)
        return all(name in now and now[name] != before[name] for name in names)

    wait_for(f"{len(names)} pods to be replaced", is_replaced, limit_s=limit_s)
    wait_until_settled(kubectl, limit_s=60)


def wait_until_settled(kubectl: Kubectl, *, limit_s: float) -> None:
    """Wait until the service is available and nothing is under way.

    A change that the operator has not seen yet leaves the conditions as they were: callers first
    wait for what the change brings.
    """

    def is_settled() -> bool:
        service = kubectl.json(SERVICE)
        found = {c["type"]: c for c in service.get("status", {}).get("conditions", [])}
        return (
            [found.get(kind, {}).get("status") for kind in ("Available", "Progressing", "Degraded")]
            == ["True", "False", "False"]
        ) and service["status"]["observedGeneration"] == service["metadata"]["generation"]

    wait_for(f"{SERVICE} to be settled", is_settled, limit_s=limit_s)


@pytest.mark.timeout(2400)
def test_images_are_built_and_loaded(images: Images) -> None:
    say(f"images: {images}")


@pytest.mark.timeout(240)
def test_helm_install(cluster: Cluster, images: Images, operator: Kubectl) -> None:
    repository, tag = images.kvasir.rsplit(":", 1)
    run(
        *("helm", "install", "kvasir", str(ROOT / "helm/kvasir")),
        *("--kubeconfig", cluster.kubeconfig),
        *("--namespace", SYSTEM_NAMESPACE, "--create-namespace"),
        *("--set", f"image.repository={repository},image.tag={tag},crds.keep=false"),
        *("--wait", "--timeout", "180s"),
        limit_s=200,
    )
    operator("wait", "--for=condition=Established", *CRDS, quiet=True)
    operator("get", "pods")
    operator("create", "namespace", NAMESPACE)
    operator("label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=restricted")
    assert "restricted" in operator("get", "namespace", NAMESPACE, "--show-labels")


@pytest.mark.timeout(60)
def test_kubectl_explains_every_level(kubectl: Kubectl) -> None:
    assert "milliseconds" in kubectl("explain", "msvc.spec.slo.ttftMs")
    assert "drainTimeoutSeconds" in kubectl("explain", "dcp.spec", quiet=True)


REFUSED = {
    "min above max": (
        CR % (SOURCE, "prefill: {replicas: 3, minReplicas: 3, maxReplicas: 2}"),
        "minReplicas must not be greater than maxReplicas",
    ),
    "replicas out of bounds": (
        CR % (SOURCE, "decode: {replicas: 9, maxReplicas: 4}"),
        "replicas must not be greater than maxReplicas",
    ),
    "unknown field": (CR % (SOURCE, "decoed: {replicas: 1}"), 'unknown field "spec.decoed"'),
    "no source": (CR % ("{}", ""), "exactly one of hostPath, pvc and image must be set"),
    "two sources": (
        CR % ("{hostPath: {path: /a}, pvc: {claimName: b}}", ""),
        "exactly one of hostPath, pvc and image must be set",
    ),
    "wrong quantity": (
        CR % (SOURCE, "router: {resources: {limits: {memory: much}}}"),
        "spec.router.resources.limits.memory",
    ),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("manifest", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_resource_is_refused(
    kubectl: Kubectl, images: Images, manifest: str, message: str
) -> None:
    answer = kubectl("apply", "-f", "-", stdin=manifest, expect_failure=True)
    assert message in answer
    assert kubectl.names(KINDS) == []


MISSING = {
    "folder in the image": (
        '{image: {reference: "MODEL", path: /nowhere}}',
        "ModelUnavailable",
        "/nowhere",
    ),
    "model in the folder": (
        '{image: {reference: "MODEL", path: /usr/share}}',
        "ContainerFailed",
        "it lacks config.json",
    ),
    "volume claim": ("{pvc: {claimName: nowhere}}", "ModelUnavailable", '"nowhere" not found'),
    "right to mount it": (SOURCE, "PodsRefused", "violates PodSecurity"),
}


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("source", "reason", "words"), MISSING.values(), ids=MISSING)
def test_missing_model_is_told_in_a_condition(
    kubectl: Kubectl, images: Images, source: str, reason: str, words: str
) -> None:
    kubectl("apply", "-f", "-", stdin=CR % (source.replace("MODEL", images.model), ""))

    def told() -> str:
        condition = kubectl.condition("msvc/bad", "Degraded")
        is_told = condition.get("reason") == reason and words in condition["message"]
        return condition["message"] if is_told else ""

    say(wait_for(f"condition Degraded, {reason}", told, limit_s=90))
    assert kubectl.condition("msvc/bad", "Available")["status"] == "False"
    kubectl("get", "msvc")
    kubectl("delete", "msvc", "bad")
    wait_for("its children to be gone", lambda: not kubectl.names(PARTS, "-l", OURS), limit_s=90)


@pytest.mark.timeout(420)
def test_sample_becomes_ready(kubectl: Kubectl, images: Images) -> None:
    sample = (ROOT / "docs/samples/smollm2.yaml").read_text()
    sample = sample.replace("kvasir-model-smollm2:dev", images.model)
    kubectl("apply", "-f", "-", stdin=sample)
    wait_until_settled(kubectl, limit_s=360)
    kubectl("wait", "--for=condition=Available", SERVICE, "--timeout=10s")
    kubectl("get", KINDS)
    kubectl("get", "pods")
    assert kubectl.json(SERVICE)["status"]["decode"]["summary"] == "2/2"


@pytest.mark.timeout(120)
def test_streamed_chat_through_the_service(router: str) -> None:
    answer = chat(router)
    tell(answer)
    assert "Paris" in answer.text
    assert answer.num_chunks > 3, "the answer came in one piece"
    tell(chat(router, max_tokens=None))  # bounded by the model and the workers' memory


@pytest.mark.timeout(120)
def test_long_prompt_is_handed_over_and_reused(router: str) -> None:
    first = chat(router, system(SYSTEM), user(QUESTION))
    tell(first)
    assert "Paris" in first.text
    assert first.stats["prefill_worker"].startswith("smollm2-prefill-")
    assert first.stats["decode_worker"].startswith("smollm2-decode-")
    assert first.stats["kv_bytes_moved"] > 0
    answered = {"role": "assistant", "content": first.text}
    asked = user("What is the capital of Italy?")
    second = chat(router, system(SYSTEM), user(QUESTION), answered, asked)
    tell(second)
    assert "Rome" in second.text
    assert second.usage["prompt_tokens_details"]["cached_tokens"] > 0


@pytest.mark.timeout(180)
def test_idle_operator_writes_nothing(kubectl: Kubectl, operator: Kubectl) -> None:
    """Three tries: a probe that fails once on a busy machine is a change that must be written."""
    writes = [_writes_of_four_reconciles(kubectl, operator)]
    while writes[-1] and len(writes) < 3:
        writes.append(_writes_of_four_reconciles(kubectl, operator))
    say(f"writes in four reconciles: {writes}")
    assert writes[-1] == 0


def _writes_of_four_reconciles(kubectl: Kubectl, operator: Kubectl) -> float:
    writes = operator_metric(operator, "kvasir_operator_api_writes_total")
    reconciles = operator_metric(operator, "kvasir_operator_reconciles_total")
    kubectl("annotate", KINDS, "--all", "--overwrite", f"e2e/touched={time.time_ns()}")
    wait_for(
        "four more reconciles",
        lambda: operator_metric(operator, "kvasir_operator_reconciles_total") >= reconciles + 4,
        limit_s=50,
    )
    return operator_metric(operator, "kvasir_operator_api_writes_total") - writes


@pytest.mark.timeout(60)
def test_drift_is_repaired_and_foreign_fields_stay(kubectl: Kubectl) -> None:
    patch = {"spec": {"publishNotReadyAddresses": False}, "metadata": {"labels": {"team": "x"}}}
    kubectl("patch", "service", "smollm2-decode", "--type=merge", "-p", json.dumps(patch))

    def is_repaired() -> bool:
        service = kubectl.json("service/smollm2-decode")
        assert service["metadata"]["labels"]["team"] == "x"
        return bool(service["spec"].get("publishNotReadyAddresses"))

    wait_for("the Service to be repaired", is_repaired, limit_s=30)


@pytest.mark.timeout(60)
def test_bad_change_is_refused(kubectl: Kubectl) -> None:
    refused = {"expect_failure": True}
    name = json.dumps({"spec": {"model": {"name": "other"}}})
    answer = kubectl("patch", SERVICE, "--type=merge", "-p", name, **refused)
    assert "model cannot be changed" in answer
    answer = kubectl("scale", DECODE, "--replicas=9", **refused)
    assert "replicas must not be greater than maxReplicas" in answer


@pytest.mark.timeout(360)
def test_scale_in_drains_under_load(
    kubectl: Kubectl, operator: Kubectl, router: str, tmp_path: Path
) -> None:
    """What is asserted lasts: a drain may be over before anybody sees the condition Draining."""
    drained = operator_metric(operator, DRAINS, outcome="drained")
    long = {"max_tokens": 160, "ignore_eos": True}
    with Load(router, num_clients=6, limit_s=120, **long) as load, ExitStack() as stack:
        pods = ready_pods(kubectl, "decode")
        logs = {pod: stack.enter_context(followed_log(kubectl, pod, tmp_path)) for pod in pods}
        urls = [stack.enter_context(port_forward(kubectl, f"pod/{pod}", 8080)) for pod in pods]
        wait_for(
            "requests on both decode workers",
            lambda: all(metric(url, "kvasir_worker_running") >= 1 for url in urls),
            limit_s=90,
        )
        kubectl("scale", DECODE, "--replicas=1")
        wait_for("one decode worker to be left", lambda: _num_pods(kubectl) == 1, limit_s=150)
        done = load.num_done
        wait_for("answers after the removal", lambda: load.num_done > done + 1, limit_s=90)
    assert load.failures == []
    assert operator_metric(operator, DRAINS, outcome="drained") == drained + 1
    [gone] = set(pods) - set(ready_pods(kubectl, "decode"))
    words = logs[gone].read_text()
    begun = re.search(r"draining: (\d+) requests in flight", words)
    assert begun, f"{gone} did not drain: {words[-2000:]}"
    assert int(begun[1]) >= 1, f"{gone} had nothing to drain: {words[-2000:]}"
    assert "drained: 0 requests" in words, f"{gone} did not finish: {words[-2000:]}"
    say(f"{gone} finished {begun[1]} requests before it went")
    assert kubectl.json(DECODE)["spec"]["replicas"] == 1


def _num_pods(kubectl: Kubectl) -> int:
    return len(kubectl.names("pods", "-l", "kvasir.dev/role=decode"))


@pytest.mark.timeout(240)
def test_scale_out(kubectl: Kubectl, router: str) -> None:
    kubectl("scale", DECODE, "--replicas=2")
    wait_for("two decode workers", lambda: len(ready_pods(kubectl, "decode")) == 2, limit_s=180)
    wait_until_settled(kubectl, limit_s=60)
    kubectl("get", KINDS)
    answer = chat(router)
    tell(answer)
    assert "Paris" in answer.text


@pytest.mark.timeout(300)
def test_killed_prefill_worker_is_not_missed(kubectl: Kubectl, router: str) -> None:
    before = pod_uids(kubectl, "prefill")
    with Load(router, num_clients=2, limit_s=120, ask=_uncached) as load:
        wait_for("an answer under load", lambda: load.num_done, limit_s=90)
        kubectl("delete", "pod", "smollm2-prefill-0", "--force", "--grace-period=0")
        done = load.num_done
        wait_for("answers after the kill", lambda: load.num_done > done + 2, limit_s=90)
    assert load.failures == []
    wait_until_replaced(kubectl, before, "smollm2-prefill-0", limit_s=180)


def _uncached(name: str) -> list[Message]:
    """A long prompt of which no worker has the beginning."""
    return [system(f"This is talk {name}. {SYSTEM}"), user(QUESTION)]


@pytest.mark.timeout(360)
def test_kv_outlives_the_workers(kubectl: Kubectl, router: str) -> None:
    """Several prompts: a worker that has just started may compute rather than fetch."""
    prompts = [system(f"Be {manner}. {SYSTEM}") for manner in ("kind", "calm", "exact")]
    for prompt in prompts:
        chat(router, prompt, user(QUESTION))
    before = pod_uids(kubectl, "prefill", "decode")
    kubectl("delete", "pods", *before, "--wait=false")
    wait_until_replaced(kubectl, before, *before, limit_s=240)
    num_fetched = 0
    for prompt in prompts:
        answer = chat(router, prompt, user(QUESTION))
        tell(answer)
        assert "Paris" in answer.text
        num_fetched += answer.stats["tokens_cached_fetched"]
    assert num_fetched > 0, "nothing came from the KV node"


@pytest.mark.timeout(240)
def test_requests_pass_without_the_kv_node(kubectl: Kubectl, router: str) -> None:
    before = pod_uids(kubectl, "kv")
    kubectl("delete", "pod", "smollm2-kv-0", "--wait=false")
    answer = chat(router, system("Be polite. " + SYSTEM), user(QUESTION))
    tell(answer)
    assert "Paris" in answer.text
    wait_until_replaced(kubectl, before, "smollm2-kv-0", limit_s=150)


@pytest.mark.timeout(60)
def test_operator_had_no_trouble(operator: Kubectl) -> None:
    log = operator("logs", "deployment/kvasir-operator", "--tail=-1", quiet=True)
    trouble = [line for line in log.splitlines() if " ERROR " in line or "Traceback" in line]
    assert trouble == []
    assert "forbidden" not in log.lower()
    [pod] = operator.json("pods", "-l", OPERATOR)["items"]
    assert pod["status"]["containerStatuses"][0]["restartCount"] == 0
    say(f"{len(log.splitlines())} lines of the operator's log, no error")


@pytest.mark.timeout(180)
def test_uninstall_leaves_nothing(cluster: Cluster, kubectl: Kubectl, operator: Kubectl) -> None:
    kubectl("delete", SERVICE)
    wait_for(
        "pools and children to be gone",
        lambda: not kubectl.names(f"pfp,dcp,kvp,{PARTS}", "-l", OURS),
        limit_s=120,
    )
    helm = ("helm", "uninstall", "kvasir", "--kubeconfig", cluster.kubeconfig)
    run(*helm, "--namespace", SYSTEM_NAMESPACE, "--wait", limit_s=120)
    left = [
        name
        for name in operator.names("crd,clusterroles,clusterrolebindings")
        if "kvasir" in name.rsplit("/", 1)[1]
    ]
    assert left == []
    wait_for(
        "the operator to be gone",
        lambda: not operator.names("deployments,pods", "-l", OPERATOR),
        limit_s=40,
    )
    operator("delete", "namespace", NAMESPACE, SYSTEM_NAMESPACE, limit_s=90)
