"""Reads from a pod what keeps it from serving, in words for the user.

A container's last words (its termination message, or else the end of its log) say more than any
status: they are taken over into the conditions of the pool and of the ModelService.
"""

from collections.abc import Iterable

from kvasir_operator.core.conditions import Problem, Reason
from kvasir_operator.core.manifests import Manifest

MODEL_CONTAINER = "model"  # the init container that copies a model out of its image
MODEL_VOLUME = "model"
LAST_WORDS_CHARS_MAX = 400

IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
START_REASONS = (
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
    "PostStartHookError",
)


def pod_problem(pod: Manifest, warning: str) -> Problem | None:
    """What is wrong with a pod; None: nothing, or it only takes its time."""
    status = pod.get("status", {})
    name = pod["metadata"]["name"]
    if "deletionTimestamp" in pod["metadata"]:
        return None
    for is_init, container in _containers(status):
        problem = _container_problem(name, container, is_init=is_init)
        if problem is not None:
            return problem
    return _placement_problem(name, status) or _mount_problem(name, status, warning)


def _containers(status: Manifest) -> Iterable[tuple[bool, Manifest]]:
    yield from ((True, c) for c in status.get("initContainerStatuses", ()))
    yield from ((False, c) for c in status.get("containerStatuses", ()))


def _container_problem(pod: str, container: Manifest, *, is_init: bool) -> Problem | None:
    where = f"pod {pod}, container {container['name']}"
    is_model = is_init and container["name"] == MODEL_CONTAINER
    state, last = container.get("state", {}), container.get("lastState", {})
    waiting = state.get("waiting", {})
    if waiting.get("reason") in IMAGE_REASONS:
        reason = Reason.MODEL_UNAVAILABLE if is_model else Reason.IMAGE_UNAVAILABLE
        return Problem(reason, f"{where}: {_join(waiting.get('reason'), waiting.get('message'))}")
    if waiting.get("reason") in START_REASONS:
        text = _join(waiting.get("reason"), waiting.get("message"))
        return Problem(Reason.POD_NOT_STARTING, f"{where}: {text}")
    ended = state.get("terminated") or last.get("terminated") or {}
    is_failed = ended.get("exitCode", 0) != 0 and not container.get("ready")
    if not is_failed:
        return None
    reason = Reason.MODEL_UNAVAILABLE if is_model else Reason.CONTAINER_FAILED
    how = f"exit code {ended['exitCode']}"
    if ended.get("reason") not in (None, "Error"):
        how += f" ({ended['reason']})"
    words = last_words(ended.get("message", ""))
    return Problem(reason, f"{where} ended with {how}" + (f": {words}" if words else ""))


def _placement_problem(pod: str, status: Manifest) -> Problem | None:
    for condition in status.get("conditions", ()):
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            message = condition.get("message", "")
            is_claim = "persistentvolumeclaim" in message.lower()
            reason = Reason.MODEL_UNAVAILABLE if is_claim else Reason.UNSCHEDULABLE
            return Problem(reason, f"pod {pod} cannot be scheduled: {message}")
    return None


def _mount_problem(pod: str, status: Manifest, warning: str) -> Problem | None:
    is_waiting = any("waiting" in c.get("state", {}) for _, c in _containers(status))
    if not warning or not is_waiting:
        return None
    is_model = f'volume "{MODEL_VOLUME}"' in warning
    reason = Reason.MODEL_UNAVAILABLE if is_model else Reason.POD_NOT_STARTING
    return Problem(reason, f"pod {pod} is not starting: {warning}")


def workload_problem(workload: Manifest, warning: str) -> Problem | None:
    """Why a Deployment or StatefulSet has fewer pods than it wants; None: it has them."""
    status = workload.get("status", {})
    if status.get("replicas", 0) >= workload["spec"].get("replicas", 1):
        return None
    failures = (c for c in status.get("conditions", ()) if c.get("type") == "ReplicaFailure")
    message = next((c.get("message", "") for c in failures), "") or warning
    name = f"{workload['kind']} {workload['metadata']['name']}"
    text = f"{name} cannot make its pods: {message}"
    return Problem(Reason.PODS_REFUSED, text) if message else None


def last_words(message: str) -> str:
    """The last line of a termination message that says something, shortened in its middle."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if not lines:
        return ""
    text = lines[-1]
    if len(text) <= LAST_WORDS_CHARS_MAX:
        return text
    half = LAST_WORDS_CHARS_MAX // 2
    return f"{text[:half]} ... {text[-half:]}"


def _join(*parts: str | None) -> str:
    return ": ".join(part for part in parts if part)
