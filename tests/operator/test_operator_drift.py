"""When a live object counts as already being as desired."""

from typing import Any

import pytest
from kvasir_operator.core.drift import contains, is_as_desired, owns_beyond

CONTAINS = {
    "equal": ({"a": 1}, {"a": 1}, True),
    "more in the live object": ({"a": 1, "b": 2}, {"a": 1}, True),
    "another value": ({"a": 2}, {"a": 1}, False),
    "a missing key": ({}, {"a": 1}, False),
    "items matched by name": (
        {"env": [{"name": "x", "value": "0"}, {"name": "a", "value": "1"}]},
        {"env": [{"name": "a", "value": "1"}]},
        True,
    ),
    "one volume mounted twice": (
        {"m": [{"mountPath": "/a", "name": "v"}, {"mountPath": "/b", "name": "v", "x": 1}]},
        {"m": [{"mountPath": "/a", "name": "v"}, {"mountPath": "/b", "name": "v", "x": 2}]},
        False,
    ),
    "plain lists as a whole": ({"args": ["a", "b"]}, {"args": ["a"]}, False),
    "quantities by value": (
        {"resources": {"limits": {"cpu": "1", "memory": "1Gi"}}},
        {"resources": {"limits": {"cpu": "1000m", "memory": "1024Mi"}}},
        True,
    ),
    "quantities that differ": (
        {"resources": {"requests": {"cpu": "1"}}},
        {"resources": {"requests": {"cpu": "1001m"}}},
        False,
    ),
    "the expected resourceVersion is no content": (
        {"metadata": {"resourceVersion": "2"}},
        {"metadata": {"resourceVersion": "1"}},
        True,
    ),
}


@pytest.mark.parametrize(("live", "desired", "expected"), CONTAINS.values(), ids=CONTAINS)
def test_contains(live: Any, desired: Any, expected: bool) -> None:
    assert contains(live, desired) is expected


SURPLUS = {
    "nothing more": ({"f:spec": {"f:a": {}}}, {"spec": {"a": 1}}, False),
    "a field that is no longer wanted": (
        {"f:spec": {"f:a": {}, "f:b": {}}},
        {"spec": {"a": 1}},
        True,
    ),
    "an item by key": (
        {"f:ports": {'k:{"port":80,"protocol":"TCP"}': {".": {}, "f:port": {}}}},
        {"ports": [{"port": 80, "protocol": "TCP"}]},
        False,
    ),
    "an item that is no longer wanted": (
        {"f:env": {'k:{"name":"b"}': {".": {}, "f:name": {}}}},
        {"env": [{"name": "a"}]},
        True,
    ),
    "a value of a set": ({"f:finalizers": {'v:"x"': {}}}, {"finalizers": ["x"]}, False),
    "a value that is no longer wanted": ({"f:set": {'v:"x"': {}}}, {"set": ["y"]}, True),
}


@pytest.mark.parametrize(("owned", "desired", "expected"), SURPLUS.values(), ids=SURPLUS)
def test_owns_beyond(owned: Any, desired: Any, expected: bool) -> None:
    assert owns_beyond(owned, desired) is expected


def test_an_object_that_was_never_applied_is_not_as_desired() -> None:
    assert not is_as_desired({"spec": {}}, {"metadata": {}, "spec": {}})
    assert not is_as_desired({"spec": {}}, None)


def test_what_others_own_does_not_count() -> None:
    entry = {"manager": "kubectl", "operation": "Update", "fieldsV1": {"f:spec": {"f:b": {}}}}
    ours = {"manager": "kvasir-operator", "operation": "Apply", "fieldsV1": {"f:spec": {}}}
    live = {"metadata": {"managedFields": [entry, ours]}, "spec": {"a": 1, "b": 2}}
    assert is_as_desired({"spec": {"a": 1}}, live)


def test_a_field_that_is_owned_and_no_longer_desired_calls_for_an_apply() -> None:
    owned = {"f:spec": {"f:a": {}, "f:b": {}}}
    ours = {"manager": "kvasir-operator", "operation": "Apply", "fieldsV1": owned}
    live = {"metadata": {"managedFields": [ours]}, "spec": {"a": 1, "b": 2}}
    assert is_as_desired({"spec": {"a": 1, "b": 2}}, live)
    assert not is_as_desired({"spec": {"a": 1}}, live)
