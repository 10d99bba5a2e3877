"""Which object a change of a child leads to."""

import pytest
from kvasir_operator.core.manifests import Owner, Ref, role_labels
from kvasir_operator.core.pool import ROLES
from kvasir_operator.settings import OperatorSettings, SettingsError
from kvasir_operator.watch import owner_of


@pytest.mark.parametrize("kind", ROLES)
def test_children_of_a_pool_lead_to_the_pool(kind: str) -> None:
    owner = Owner("kvasir.dev/v1alpha1", kind, "ns", "x", "uid")
    assert owner_of("ns", role_labels(owner, ROLES[kind])) == Ref(kind, "ns", "x")


def test_children_of_a_service_lead_to_the_service() -> None:
    owner = Owner("kvasir.dev/v1alpha1", "ModelService", "ns", "x", "uid")
    assert owner_of("ns", role_labels(owner, "decode")) == owner.ref


def test_objects_of_others_lead_nowhere() -> None:
    assert owner_of("ns", {"app": "x"}) is None
    assert owner_of("ns", {"kvasir.dev/pool": "x", "kvasir.dev/role": "other"}) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [("image", ""), ("http_port", 70000), ("num_reconcilers", 0), ("resync_interval_s", 0)],
)
def test_settings_name_what_is_wrong(field: str, value: object) -> None:
    with pytest.raises(SettingsError, match=field):
        OperatorSettings(**{"image": "kvasir", field: value})
