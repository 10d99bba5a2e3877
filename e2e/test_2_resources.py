"""Resources as their users meet them: explained, refused with a reason, honest about what lacks."""

import pytest
from conftest import Images
from e2e_cluster import KINDS, OURS, PARTS
from e2e_shell import Kubectl, say, wait_for

SOURCE = "{hostPath: {path: /nowhere}}"
CR = """
apiVersion: kvasir.dev/v1alpha1
kind: ModelService
metadata: {name: bad}
spec:
  model: {name: bad, source: %s}
  %s
"""


@pytest.mark.timeout(300)
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


@pytest.mark.timeout(300)
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


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("source", "reason", "words"), MISSING.values(), ids=MISSING)
def test_missing_model_is_told_in_a_condition(
    kubectl: Kubectl, images: Images, source: str, reason: str, words: str
) -> None:
    kubectl("apply", "-f", "-", stdin=CR % (source.replace("MODEL", images.model), ""))

    def told() -> str:
        condition = kubectl.condition("msvc/bad", "Degraded")
        is_told = condition.get("reason") == reason and words in condition["message"]
        return condition["message"] if is_told else ""

    say(wait_for(f"condition Degraded, {reason}", told, limit_s=180))
    assert kubectl.condition("msvc/bad", "Available")["status"] == "False"
    kubectl("get", "msvc")
    kubectl.delete("msvc", "bad")
    wait_for("its children to be gone", lambda: not kubectl.names(PARTS, "-l", OURS), limit_s=180)
