"""A watch that does not bring what reads show is found, and only such a watch."""

from kvasir_operator.audit import FORGET_AFTER_S, WATCH_LAG_MAX_S, WatchAudit
from kvasir_operator.core.manifests import MANAGED_BY, Manifest


class Clock:
    """Seconds that a test moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def make_pod(version: int, *, uid: str = "u", labels: Manifest = MANAGED_BY) -> Manifest:
    return {"metadata": {"uid": uid, "resourceVersion": str(version), "labels": labels}}


def make_audit() -> tuple[WatchAudit, Clock]:
    clock = Clock()
    return WatchAudit(now_s=clock), clock


def test_a_version_that_no_watch_brings_means_a_silent_watch() -> None:
    audit, clock = make_audit()
    audit.delivered(make_pod(1), is_gone=False)
    assert not audit.observed(make_pod(2), kind="Pod")
    clock.now_s += WATCH_LAG_MAX_S + 1
    assert audit.silent() == {}, "one read alone proves nothing: the object may be gone"
    audit.observed(make_pod(3), kind="Pod")
    assert audit.silent() == {"Pod": WATCH_LAG_MAX_S + 1}
    audit.delivered(make_pod(3), is_gone=False)
    assert audit.silent() == {}


def test_what_the_watch_has_brought_is_no_lag() -> None:
    audit, clock = make_audit()
    audit.delivered(make_pod(1), is_gone=False)
    for _ in range(5):
        assert audit.observed(make_pod(1), kind="Pod")
        clock.now_s += WATCH_LAG_MAX_S
    assert audit.silent() == {}


def test_an_object_that_was_read_while_it_went_is_forgotten() -> None:
    audit, clock = make_audit()
    audit.delivered(make_pod(1), is_gone=True)
    audit.observed(make_pod(1), kind="Pod")
    clock.now_s += FORGET_AFTER_S + 1
    assert audit.silent() == {}


def test_objects_that_the_watches_do_not_select_do_not_count() -> None:
    audit, clock = make_audit()
    for _ in range(3):
        assert audit.observed(make_pod(1, labels={}), kind="Service")
        clock.now_s += WATCH_LAG_MAX_S
    assert audit.silent() == {}
    assert not audit.observed(make_pod(1, labels={}), kind="ModelService")
