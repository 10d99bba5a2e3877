"""What the operator reads from a pod that does not serve."""

from typing import Any

import pytest
from kvasir_operator.core.problems import LAST_WORDS_CHARS_MAX, last_words, pod_problem
from operator_builders import make_pod

MOUNT = 'FailedMount: MountVolume.SetUp failed for volume "model" : /nope is not a directory'


def waiting(reason: str, message: str = "", **more: Any) -> dict[str, Any]:
    """The status of a container that waits."""
    return {"name": "decode", "state": {"waiting": {"reason": reason, "message": message}}, **more}


def ended(code: int, message: str = "", **more: Any) -> dict[str, Any]:
    """The last state of a container that has ended."""
    return {"terminated": {"exitCode": code, "message": message, **more}}


CASES = {
    "image": (
        {"containerStatuses": [waiting("ImagePullBackOff", "not found")]},
        "",
        ("ImageUnavailable", "pod p-0, container decode: ImagePullBackOff: not found"),
    ),
    "crash with last words": (
        {"containerStatuses": [waiting("CrashLoopBackOff", lastState=ended(1, "a\nerror: b\n"))]},
        "",
        ("ContainerFailed", "pod p-0, container decode ended with exit code 1: error: b"),
    ),
    "out of memory": (
        {"containerStatuses": [waiting("x", lastState=ended(137, reason="OOMKilled"))]},
        "",
        ("ContainerFailed", "pod p-0, container decode ended with exit code 137 (OOMKilled)"),
    ),
    "model image": (
        {"initContainerStatuses": [waiting("ErrImagePull", "no") | {"name": "model"}]},
        "",
        ("ModelUnavailable", "pod p-0, container model: ErrImagePull: no"),
    ),
    "folder missing in the model image": (
        {"initContainerStatuses": [{"name": "model", "state": ended(1, "cp: no such file")}]},
        "",
        ("ModelUnavailable", "pod p-0, container model ended with exit code 1: cp: no such file"),
    ),
    "folder missing on the node": (
        {"containerStatuses": [waiting("ContainerCreating")]},
        MOUNT,
        ("ModelUnavailable", f"pod p-0 is not starting: {MOUNT}"),
    ),
    "claim missing": (
        {
            "containerStatuses": [],
            "conditions": [
                {
                    "type": "PodScheduled",
                    "status": "False",
                    "message": 'persistentvolumeclaim "m" not found',
                }
            ],
        },
        "",
        (
            "ModelUnavailable",
            'pod p-0 cannot be scheduled: persistentvolumeclaim "m" not found',
        ),
    ),
    "no node": (
        {
            "containerStatuses": [],
            "conditions": [
                {"type": "PodScheduled", "status": "False", "message": "too little cpu"}
            ],
        },
        "",
        ("Unschedulable", "pod p-0 cannot be scheduled: too little cpu"),
    ),
    "only takes its time": ({"containerStatuses": [waiting("ContainerCreating")]}, "", None),
    "serves again after a crash": (
        {
            "containerStatuses": [
                {"name": "d", "ready": True, "state": {"running": {}}, "lastState": ended(1, "x")}
            ]
        },
        "",
        None,
    ),
}


@pytest.mark.parametrize(("status", "warning", "expected"), CASES.values(), ids=CASES)
def test_problem_of_a_pod(
    status: dict[str, Any], warning: str, expected: tuple[str, str] | None
) -> None:
    problem = pod_problem(make_pod("p-0", **status), warning)
    assert (problem and (problem.reason.value, problem.message)) == expected


def test_a_pod_that_leaves_has_no_problem() -> None:
    status = [waiting("ImagePullBackOff")]
    assert pod_problem(make_pod("p-0", leaving=True, containerStatuses=status), "") is None


def test_long_last_words_keep_their_ends() -> None:
    words = last_words("first\n" + "a" * 1000 + "END")
    assert len(words) <= LAST_WORDS_CHARS_MAX + 5
    assert words.endswith("END")
