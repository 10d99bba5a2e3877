"""A model folder that appears whole or not at all.

Files are written beside the target and renamed at the end; a manifest in the folder lists every
file's size, so that a later command can tell that the folder is whole. What the files hold is
left to the callers.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvasir_cli.errors import CommandError, RefusedError
from kvasir_cli.progress import size_text

MANIFEST = "kvasir-manifest.json"


def holds_whole(target: Path, source: str) -> bool:
    """Whether `target` was made from `source` and all its files have their full size."""
    try:
        manifest = json.loads((target / MANIFEST).read_text())
        sizes = {str(name): int(size) for name, size in manifest["file_bytes"].items()}
        return bool(manifest["source"] == source) and all(
            (target / name).stat().st_size == size for name, size in sizes.items()
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def refuse_occupied(target: Path) -> None:
    """Raises RefusedError unless `target` is free to be made: absent or an empty folder."""
    if not target.exists():
        return
    if not target.is_dir():
        raise RefusedError(f"{target} exists and is not a folder")
    if any(target.iterdir()):
        raise RefusedError(f"{target} is not empty: remove it or choose another folder")


@contextmanager
def new_folder(target: Path, source: str) -> Iterator[Path]:
    """Yields a folder to fill, which becomes `target` if the block ends without error."""
    refuse_occupied(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        write_json(partial / MANIFEST, {"source": source, "file_bytes": sizes})
        if target.exists():
            target.rmdir()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_full_disk(target: Path, num_bytes_needed: int) -> None:
    """Raises CommandError unless the disk under `target` has that much room."""
    parent = target.absolute()
    while not parent.exists():
        parent = parent.parent
    num_bytes_free = shutil.disk_usage(parent).free
    if num_bytes_free < num_bytes_needed:
        raise CommandError(
            f"not enough disk under {parent}: {size_text(num_bytes_needed)} are needed, "
            f"{size_text(num_bytes_free)} are free"
        )


def write_json(path: Path, value: object) -> None:
    """Write `value` as readable JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
