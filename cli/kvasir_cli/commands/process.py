"""kvasir worker, kvnode, router, operator: one part in one process.

Their options are the fields of the part's settings class; what the part does is left to it.
"""

import importlib
import json
import logging
import os
from datetime import UTC, datetime
from typing import Any

import click

from kvasir_cli.errors import CommandError, RefusedError
from kvasir_cli.parent import die_with_parent

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


class JsonFormatter(logging.Formatter):
    """One JSON object a line, for collectors of logs."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line; a traceback goes into one field."""
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


LOG_FORMATTERS = {"text": logging.Formatter(LOG_FORMAT), "json": JsonFormatter()}


class ProcessCommand(click.Command):
    """Runs a part; imports its settings when options are read and its server when it starts."""

    def __init__(self, name: str, *, package: str, settings: str, help: str) -> None:  # noqa: A002
        super().__init__(name, help=help, callback=self._start)
        self._package = package
        self._settings = settings
        self._options: list[click.Parameter] | None = None

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The options of the settings class, then --help."""
        from kvasir_cli.settings_options import options

        if self._options is None:
            self._options = options(self._settings_class())
            self.params = self._options
        return super().get_params(ctx)

    def _settings_class(self) -> type:
        module, name = self._settings.split(":")
        found: Any = getattr(self._import(module), name)
        assert isinstance(found, type)
        return found

    def _start(self, **values: Any) -> None:
        from kvasir_cli.settings_options import build

        die_with_parent()
        configure_logging()
        settings = build(self._settings_class(), values)
        self._import("main").run(settings)

    def _import(self, module: str) -> Any:
        try:
            return importlib.import_module(f"{self._package}.{module}")
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith(self._package):
                raise
            raise CommandError(f"{self.name} is not part of this build") from error


def configure_logging() -> None:
    """Log to stderr at the level of KVASIR_LOG, else info, in KVASIR_LOG_FORMAT, else text."""
    name = os.environ.get("KVASIR_LOG", "info").upper()
    level = logging.getLevelNamesMapping().get(name)
    if level is None:
        raise RefusedError(f"KVASIR_LOG: {name.lower()!r} is not a level of logging")
    format_name = os.environ.get("KVASIR_LOG_FORMAT", "text")
    if format_name not in LOG_FORMATTERS:
        raise RefusedError(f"KVASIR_LOG_FORMAT: {format_name!r} is neither text nor json")
    handler = logging.StreamHandler()
    handler.setFormatter(LOG_FORMATTERS[format_name])
    logging.basicConfig(level=level, handlers=[handler])


worker = ProcessCommand(
    "worker",
    package="kvasir_engine.worker",
    settings="settings:WorkerSettings",
    help="Serve a model in the role prefill, decode or both.",
)
kvnode = ProcessCommand(
    "kvnode",
    package="kvasir_kvstore.node",
    settings="settings:KvNodeSettings",
    help="Hold KV blocks that workers offer and fetch.",
)
router = ProcessCommand(
    "router",
    package="kvasir_router",
    settings="settings:RouterSettings",
    help="Serve the OpenAI HTTP API and gRPC in front of workers.",
)
operator = ProcessCommand(
    "operator",
    package="kvasir_operator",
    settings="settings:OperatorSettings",
    help="Reconcile ModelServices and pools in a Kubernetes cluster.",
)
