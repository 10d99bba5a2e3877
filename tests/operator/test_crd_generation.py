"""The CRDs that the models generate, and that the committed files are those."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from kvasir_operator.api import KINDS, POOL_KINDS, Kind, ModelServiceSpec
from kvasir_operator.api_base import ApiModel
from kvasir_operator.core.pool import SPECS
from kvasir_operator.crd_schema import crd, root_schema, structural, undescribed
from kvasir_operator.crdgen import generated

ROOT = Path(__file__).parents[2]
KIND_IDS = [kind.kind for kind in KINDS]
FORBIDDEN_KEYS = (
    "$ref",
    "$defs",
    "title",
    "const",
    "exclusiveMinimum",
    "oneOf",
    "patternProperties",
)


def schemas_in(node: Any) -> list[dict[str, Any]]:
    """Every schema inside a schema, itself included."""
    if not isinstance(node, dict):
        return []
    found = [node]
    for child in node.get("properties", {}).values():
        found += schemas_in(child)
    return found + schemas_in(node.get("items")) + schemas_in(node.get("additionalProperties"))


@pytest.mark.parametrize("path", sorted(generated()))
def test_committed_file_is_what_the_models_generate(path: str) -> None:
    assert (ROOT / path).read_text() == generated()[path], "run make gen"


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_every_field_has_a_description(kind: Kind) -> None:
    schema = root_schema(kind)
    del schema["properties"]["metadata"]
    assert undescribed(schema) == []


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_every_rule_says_what_to_do(kind: Kind) -> None:
    schemas = schemas_in(root_schema(kind))
    messages = [r["message"] for s in schemas for r in s.get("x-kubernetes-validations", ())]
    assert len(messages) > 10
    assert [message for message in messages if ": " not in message] == []


def test_a_field_without_description_is_found() -> None:
    class Bare(ApiModel):
        field: int = 1

    assert undescribed(structural(Bare)) == [".field"]


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_schema_is_structural(kind: Kind) -> None:
    for schema in schemas_in(root_schema(kind)):
        assert not set(schema) & set(FORBIDDEN_KEYS)
        assert "type" in schema or schema.get("x-kubernetes-int-or-string")
        assert not ("properties" in schema and "additionalProperties" in schema)


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_kind_has_names_columns_and_status(kind: Kind) -> None:
    made = crd(kind)
    names, version = made["spec"]["names"], made["spec"]["versions"][0]
    assert names["shortNames"] == [kind.short_name]
    assert names["categories"] == ["kvasir"]
    assert version["subresources"]["status"] == {}
    assert [c["name"] for c in version["additionalPrinterColumns"]][-1] == "Age"
    assert {"observedGeneration", "conditions"} <= set(
        version["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]
    )


@pytest.mark.parametrize("kind", POOL_KINDS, ids=[kind.kind for kind in POOL_KINDS])
def test_pool_has_the_scale_subresource(kind: Kind) -> None:
    scale = crd(kind)["spec"]["versions"][0]["subresources"]["scale"]
    assert scale["labelSelectorPath"] == ".status.selector"
    assert SPECS[kind.kind] is kind.spec


def test_objects_default_to_the_defaults_of_their_fields() -> None:
    fields = structural(ModelServiceSpec)["properties"]
    assert fields["router"]["default"]["replicas"] == 1
    assert fields["router"]["default"]["httpPort"] == 8000
    for optional in ("prefill", "decode", "kvCache"):
        assert "default" not in fields[optional]


def test_bounds_are_rules_in_templates_and_pools() -> None:
    for schema in (
        structural(ModelServiceSpec)["properties"]["decode"],
        structural(ModelServiceSpec)["properties"]["kvCache"],
        *(structural(kind.spec) for kind in POOL_KINDS),
    ):
        rules = [rule["rule"] for rule in schema["x-kubernetes-validations"]]
        assert "self.minReplicas <= self.maxReplicas" in rules


def test_chart_rules_name_what_the_operator_uses_and_no_wildcard() -> None:
    template = (ROOT / "helm/kvasir/templates/_names.tpl").read_text()
    text = template.split('define "kvasir.rules" -}}')[1].split("{{- end }}")[0]
    rules = yaml.safe_load(text)
    granted = {
        (resource, verb) for r in rules for resource in r["resources"] for verb in r["verbs"]
    }
    assert not any("*" in pair for pair in granted)
    for plural in ("services", "statefulsets", "deployments", "poddisruptionbudgets"):
        assert {(plural, verb) for verb in ("get", "watch", "create", "patch")} <= granted
    assert ("modelservices", "patch") not in granted
    assert ("modelservices/status", "patch") in granted
