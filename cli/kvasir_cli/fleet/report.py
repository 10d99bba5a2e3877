"""What a fleet says while it starts, runs and stops: lines that stay, and what it waits for."""

import sys
import time
from typing import Protocol

import click

WAITING_INTERVAL_S = 5.0


class Report(Protocol):
    """Takes lines for a person."""

    def line(self, text: str) -> None:
        """Something happened."""

    def waiting(self, text: str) -> None:
        """What is being waited for at this moment; empty: nothing."""


class LineReport:
    """Lines on stdout; what is waited for is repeated every few seconds."""

    def __init__(self) -> None:
        self._said_s = time.monotonic()

    def line(self, text: str) -> None:
        """Print it."""
        click.echo(text)
        self._said_s = time.monotonic()

    def waiting(self, text: str) -> None:
        """Print it, if nothing was printed for a while."""
        if text and time.monotonic() - self._said_s >= WAITING_INTERVAL_S:
            self.line(f"  waiting for {text}")


class TerminalReport:
    """Lines, and below them a spinner with what is waited for."""

    def __init__(self) -> None:
        from rich.console import Console

        self._status = Console(highlight=False).status("")
        self._is_spinning = False

    def line(self, text: str) -> None:
        """Print it above the spinner."""
        self._status.console.print(text, markup=False, soft_wrap=True)

    def waiting(self, text: str) -> None:
        """Show it beside the spinner."""
        from rich.markup import escape

        if text:
            self._status.update(f"waiting for {escape(text)}")
        if bool(text) != self._is_spinning:
            self._is_spinning = bool(text)
            if text:
                self._status.start()
            else:
                self._status.stop()


def make_report() -> Report:
    """The report that suits stdout."""
    return TerminalReport() if sys.stdout.isatty() else LineReport()
