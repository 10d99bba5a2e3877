"""Command-line options made from a settings class, one to one.

The class is the only definition: its fields give names, types, defaults and, by the text beside
them, help. Decides how a field looks on a command line (`kv_nodes: tuple[str, ...]` is
`--kv-node`, given repeatedly) and in the environment (KVASIR_KV_NODES); what is valid is left to
the class.
"""

import ast
import dataclasses
import inspect
import re
import textwrap
import types
import typing
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel, ValidationError

ENV_PREFIX = "KVASIR_"


@dataclass(frozen=True, slots=True)
class SettingField:
    """One field of a settings class."""

    name: str
    annotation: Any
    default: Any
    required: bool
    help: str

    @property
    def is_list(self) -> bool:
        """Whether the option may be given several times."""
        return typing.get_origin(self.annotation) is tuple

    @property
    def flag(self) -> str:
        """How it is written on a command line."""
        name = self.name.removesuffix("s") if self.is_list else self.name
        return "--" + name.replace("_", "-")


class _UidType(click.ParamType[bytes]):
    name = "uuid"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> bytes:
        if isinstance(value, bytes):
            return value
        try:
            return uuid.UUID(value).bytes
        except ValueError:
            self.fail(f"{value!r} is not a UUID", param, ctx)


def options(settings_class: type) -> list[click.Parameter]:
    """One option per field of the class."""
    return [_option(field) for field in fields_of(settings_class)]


def build(settings_class: type, values: dict[str, Any]) -> Any:
    """The settings from parsed options; an option that was not given keeps the field's default.

    Raises:
        click.UsageError: a value the class refuses; it names the flag.
    """
    fields = fields_of(settings_class)
    given = {
        field.name: values[field.name]
        for field in fields
        if values.get(field.name) is not None and values[field.name] != ()
    }
    try:
        return settings_class(**given)
    except ValidationError as error:
        problem = error.errors()[0]
        message = str(problem["msg"]).removeprefix("Value error, ")
        if problem["loc"]:
            flag = next((f.flag for f in fields if f.name == problem["loc"][0]), problem["loc"][0])
            raise click.UsageError(f"{flag}: {message}") from error
        raise click.UsageError(_with_flags(message, fields)) from error
    except ValueError as error:
        raise click.UsageError(_with_flags(str(error), fields)) from error


def fields_of(settings_class: type) -> list[SettingField]:
    """The fields of a pydantic model or a dataclass."""
    texts: dict[str, str] = {}
    for part in reversed(settings_class.__mro__[:-1]):
        texts |= _field_texts(part)
    hints = typing.get_type_hints(settings_class)
    found = []
    for name, default, required in _raw_fields(settings_class):
        annotation = _without_none(hints[name])
        found.append(SettingField(name, annotation, default, required, texts.get(name, "")))
    return found


def _raw_fields(settings_class: type) -> list[tuple[str, Any, bool]]:
    if issubclass(settings_class, BaseModel):
        return [
            (name, None if field.is_required() else field.get_default(), field.is_required())
            for name, field in settings_class.model_fields.items()
        ]
    assert dataclasses.is_dataclass(settings_class)
    missing = dataclasses.MISSING
    return [
        (field.name, None if field.default is missing else field.default, field.default is missing)
        for field in dataclasses.fields(settings_class)
    ]


def _without_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return next(kind for kind in typing.get_args(annotation) if kind is not type(None))
    return annotation


def _option(field: SettingField) -> click.Option:
    kind = typing.get_args(field.annotation)[0] if field.is_list else field.annotation
    is_switch = kind is bool
    shown = field.default is not None and field.default != () and not is_switch
    declared = f"{field.flag}/--no-{field.flag[2:]}" if is_switch else field.flag
    keywords: dict[str, Any] = {"default": field.default} if is_switch else {}
    return click.Option(
        [declared, field.name],
        type=None if is_switch else _param_type(kind),
        multiple=field.is_list,
        required=field.required,
        envvar=ENV_PREFIX + field.name.upper(),
        help=" ".join(filter(None, (field.help, f"[default: {field.default}]" if shown else ""))),
        **keywords,
    )


def _param_type(kind: Any) -> click.ParamType[Any]:
    if typing.get_origin(kind) is typing.Literal:
        return click.Choice([str(value) for value in typing.get_args(kind)])
    if isinstance(kind, type) and issubclass(kind, Path):
        return click.Path(path_type=Path)
    simple: dict[Any, click.ParamType[Any]] = {
        int: click.INT,
        float: click.FLOAT,
        bytes: _UidType(),
    }
    return simple.get(kind, click.STRING)


def _with_flags(message: str, fields: list[SettingField]) -> str:
    """The message with field names written as flags."""
    flags = {field.name: field.flag for field in fields if "_" in field.name}
    for name, flag in flags.items():
        message = re.sub(rf"\b{name}\b", flag, message)
    return message


def _field_texts(settings_class: type) -> dict[str, str]:
    """The string under each field, or the comment beside it, from the class's source."""
    try:
        source = textwrap.dedent(inspect.getsource(settings_class))
    except (OSError, TypeError):
        return {}
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    lines = source.splitlines()
    texts: dict[str, str] = {}
    name = ""
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
            _, _, comment = lines[(node.end_lineno or node.lineno) - 1].partition("  # ")
            texts[name] = comment
        elif name and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            texts[name] = " ".join(str(node.value.value).split())
            name = ""
    return texts
