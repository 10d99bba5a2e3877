"""Progress of long work: a bar on a terminal, sparse lines elsewhere.

Decides how progress looks; callers only say how much there is and how far they are.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import click

LINE_INTERVAL_S = 5.0
"""Between two lines where there is no terminal: seen in a log, not flooding it."""

STAGE_COUNT_MAX = 100_000
"""A stage with a larger total counts bytes."""

Advance = Callable[[int], None]


def byte_progress(title: str, num_bytes_total: int) -> AbstractContextManager[Advance]:
    """Gives a function to call with the number of bytes done since the last call."""
    return _progress(title, num_bytes_total, size_text(num_bytes_total), counts_bytes=True)


def count_progress(title: str, num_total: int) -> AbstractContextManager[Advance]:
    """Gives a function to call with the number of things done since the last call."""
    return _progress(title, num_total, str(num_total), counts_bytes=False)


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """Gives a function to call with a stage's name, how much of it is done and how much there is.

    A stage begins when its name is first reported and ends with the next stage.
    """
    with ExitStack() as stack:
        name, done = "", 0
        advance: Advance = lambda _: None  # noqa: E731

        def report(stage: str, now_done: int, total: int) -> None:
            nonlocal name, done, advance
            if stage != name:
                stack.close()
                name, done = stage, 0
                counts_bytes = total > STAGE_COUNT_MAX
                text = size_text(total) if counts_bytes else str(total)
                context = _progress(stage, total, text, counts_bytes=counts_bytes)
                advance = stack.enter_context(context)
            advance(now_done - done)
            done = now_done

        yield report


@contextmanager
def _progress(title: str, total: int, total_text: str, *, counts_bytes: bool) -> Iterator[Advance]:
    if sys.stdout.isatty():
        with _bar(title, total, counts_bytes=counts_bytes) as advance:
            yield advance
    else:
        with _lines(title, total, total_text) as advance:
            yield advance


@contextmanager
def _bar(title: str, total: int, *, counts_bytes: bool) -> Iterator[Advance]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counted: list[ProgressColumn] = [MofNCompleteColumn()]
    if counts_bytes:
        counted = [DownloadColumn(), TransferSpeedColumn()]
    columns = (TextColumn("{task.description}"), BarColumn(), *counted, TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)


@contextmanager
def _lines(title: str, total: int, total_text: str) -> Iterator[Advance]:
    started = last = time.monotonic()
    done = 0
    click.echo(f"{title}: {total_text}")

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        if time.monotonic() - last >= LINE_INTERVAL_S:
            last = time.monotonic()
            click.echo(f"{title}: {100 * done // max(1, total)} %")

    yield advance
    click.echo(f"{title}: done in {time.monotonic() - started:.1f} s")


def size_text(num_bytes: int) -> str:
    """A size as people read it: 98.4 MB."""
    for power, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= power:
            return f"{num_bytes / power:.1f} {unit}"
    return f"{num_bytes} B"
