"""The command kvasir: a table of subcommands, each imported only when it is called.

Decides how errors look and how the help reads; what a subcommand does is left to its module.
Invariant: `kvasir --help` imports click and nothing of the parts.
"""

import importlib
import sys
from dataclasses import dataclass
from typing import Any

import click

from kvasir_cli.errors import debugging, describe


@dataclass(frozen=True, slots=True)
class Entry:
    """One subcommand: where it lives, how the help lists it."""

    section: str
    name: str
    target: str  # module:attribute
    summary: str


RUN = "Run a fleet on this machine"
MODELS = "Models"
MEASURE = "Measure and check"
PARTS = "Parts, one process each (what `up` and the operator start)"

ENTRIES = (
    Entry(RUN, "up", "fleet:up", "Start a fleet: router, prefill and decode workers, KV nodes."),
    Entry(RUN, "down", "fleet:down", "Stop a fleet that runs in the background."),
    Entry(RUN, "status", "status:status", "Show the parts of a running fleet, load and cache."),
    Entry(RUN, "chat", "talk:chat", "Chat with a running fleet in the terminal."),
    Entry(RUN, "generate", "talk:generate", "Complete one prompt."),
    Entry(RUN, "demo", "demo:demo", "Start a fleet, chat two turns, show who served them."),
    Entry(MODELS, "model", "model:model", "Get, import and make model folders."),
    Entry(MEASURE, "bench", "bench:bench", "Measure the engine, a fleet or KV transfer."),
    Entry(MEASURE, "engine", "engine:engine", "Run the engine alone: logits of given tokens."),
    Entry(MEASURE, "kv", "kv:kv", "Probe what codecs of KV cost a model."),
    Entry(MEASURE, "sim", "sim:sim", "Run the fleet's decisions under a simulated clock."),
    Entry(MEASURE, "kube", "kube:kube", "Show what the operator would make of a file."),
    Entry(PARTS, "worker", "process:worker", "Serve a model: prefill, decode or both."),
    Entry(PARTS, "kvnode", "process:kvnode", "Hold KV blocks for all workers."),
    Entry(PARTS, "router", "process:router", "OpenAI HTTP and gRPC in front of the workers."),
    Entry(PARTS, "operator", "process:operator", "Reconcile Kvasir's custom resources."),
)

EPILOG = """\b
Examples:
  kvasir model get smollm2 ~/models/smollm2
  kvasir up --model ~/models/smollm2 --prefill 2 --decode 2 --kv-nodes 1
  kvasir chat
  kvasir generate --prompt "The capital of France is" --max-tokens 8
  kvasir status
"""


class LazyGroup(click.Group):
    """Lists subcommands from the table; imports one when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the table's order."""
        return [entry.name for entry in ENTRIES]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The subcommand of that name, imported now."""
        for entry in ENTRIES:
            if entry.name == cmd_name:
                module, attribute = entry.target.split(":")
                found: Any = importlib.import_module(f"kvasir_cli.commands.{module}")
                command = getattr(found, attribute)
                assert isinstance(command, click.Command)
                return command
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table by sections, with no import of what it lists."""
        for section in dict.fromkeys(entry.section for entry in ENTRIES):
            with formatter.section(section):
                formatter.write_dl(
                    [(entry.name, entry.summary) for entry in ENTRIES if entry.section == section],
                    col_spacing=4,
                )


@click.group(
    cls=LazyGroup,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="kvasir", message="kvasir %(version)s")
def cli() -> None:
    """Serve large language models with prefill, decode and KV cache on separate workers.

    KVASIR_DEBUG=1 shows tracebacks of errors.
    """


def main() -> None:
    """Run the command line; one clear line for every error that is not our bug."""
    try:
        status = cli.main(prog_name="kvasir", standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        _show_click_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        described = None if debugging() else describe(error)
        if described is None:
            raise
        line, exit_status = described
        _show_line(line)
        sys.exit(exit_status)
    sys.exit(status if isinstance(status, int) else 0)


def _show_click_error(error: click.ClickException) -> None:
    hint = ""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return
    if isinstance(error, click.UsageError) and error.ctx is not None:
        hint = f" (see {error.ctx.command_path} --help)"
    _show_line(error.format_message().rstrip(".") + hint)


def _show_line(line: str) -> None:
    click.echo(f"{click.style('error:', fg='red', bold=True)} {line}", err=True)
