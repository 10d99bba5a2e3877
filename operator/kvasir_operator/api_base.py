"""What every object of Kvasir's API has in common: its form, its rules, lists merged by a key.

A field's description becomes `kubectl explain`, a rule becomes a CEL validation in the API server.
"""

from typing import Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

NAME_PATTERN = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"


class Rule(NamedTuple):
    """One CEL validation: what must hold, and what the user reads when it does not."""

    rule: str
    message: str


class ApiModel(BaseModel):
    """One object of the API: immutable, camelCase outside, unknown fields refused.

    `RULES` are those of the class itself; those of its bases hold, too.
    """

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True
    )
    RULES: ClassVar[tuple[Rule, ...]] = ()

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core_schema))
        bases = reversed(cls.__mro__)
        rules = [rule._asdict() for base in bases for rule in vars(base).get("RULES", ())]
        if rules:
            schema["x-kubernetes-validations"] = rules
        return schema


def map_list(key: str) -> dict[str, Any]:
    """Schema extra of a list whose items are merged by `key`."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}
