"""Progress of long work: a bar on a terminal, sparse lines elsewhere.

Decides how progress looks; callers only say how much there is and how far they are.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

LINE_INTERVAL_S = 5.0
"""Between two lines where there is no terminal: seen in a log, not flooding it."""

Advance = Callable[[int], None]


@contextmanager
def byte_progress(title: str, num_bytes_total: int) -> Iterator[Advance]:
    """Yields a function to call with the number of bytes done since the last call."""
    from rich.console import Console

    if Console().is_terminal:
        with _bar(title, num_bytes_total) as advance:
            yield advance
    else:
        with _lines(title, num_bytes_total) as advance:
            yield advance


@contextmanager
def _bar(title: str, num_bytes_total: int) -> Iterator[Advance]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(title, total=num_bytes_total)
        yield lambda num_bytes: progress.advance(task, num_bytes)


@contextmanager
def _lines(title: str, num_bytes_total: int) -> Iterator[Advance]:
    started = last = time.monotonic()
    done = 0
    click.echo(f"{title}: {size_text(num_bytes_total)}")

    def advance(num_bytes: int) -> None:
        nonlocal done, last
        done += num_bytes
        if time.monotonic() - last >= LINE_INTERVAL_S:
            last = time.monotonic()
            click.echo(f"{title}: {100 * done // max(1, num_bytes_total)} %")

    yield advance
    click.echo(f"{title}: done in {time.monotonic() - started:.1f} s")


def size_text(num_bytes: int) -> str:
    """A size as people read it: 98.4 MB."""
    for power, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= power:
            return f"{num_bytes / power:.1f} {unit}"
    return f"{num_bytes} B"
