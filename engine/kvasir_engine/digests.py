"""The digest of a model's weight files, remembered beside them, so that a load need not read them.

Decides when a remembered digest still holds: each file has the identity, size and times (that of
its last change among them, which programs cannot set) that it had when the digest was taken.
Invariant: a file changed since then is seen. Times are coarse, so what changed shortly before is
not remembered: a second change in the same tick would not show.
"""

import json
import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from kvasir_engine.packed import FOLDER
from kvasir_engine.weights import DIGEST_BYTES, Progress, WeightFile, stamp_of, weights_digest

log = logging.getLogger(__name__)

NAME = "weights.json"
SETTLED_S = 2.0
"""Since a file's last change. Ticks of file systems in use are shorter."""


def remembered_digest(
    model_dir: Path | str,
    files: list[WeightFile],
    *,
    num_threads: int,
    progress: Progress | None = None,
) -> bytes:
    """The digest as remembered, else taken now and remembered if that is possible."""
    record = Path(model_dir) / FOLDER / NAME
    stamps = {file.path.name: list(file.stamp) for file in files}
    known = _read(record)
    if known is not None and known[0] == stamps:
        return known[1]
    started_s = time.time()
    digest = weights_digest(files, num_threads=num_threads, progress=progress)
    if _are_settled(files, started_s):
        _write(record, {"files": stamps, "digest": digest.hex()})
    return digest


def _read(record: Path) -> tuple[object, bytes] | None:
    try:
        known = json.loads(record.read_text())
        digest = bytes.fromhex(known["digest"])
        if len(digest) != DIGEST_BYTES:
            raise ValueError(f"a digest of {len(digest)} bytes")
        return known["files"], digest
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("%s is not used: %s", record, error)
        return None


def _are_settled(files: Sequence[WeightFile], started_s: float) -> bool:
    """Whether what was read is what lies there, and a change would show."""
    try:
        return all(
            stamp_of(os.stat(file.path)) == file.stamp and file.changed_s + SETTLED_S <= started_s
            for file in files
        )
    except OSError:
        return False


def _write(record: Path, content: object) -> None:
    new = record.with_name(f"{NAME}.{os.getpid()}.new")
    try:
        record.parent.mkdir(exist_ok=True)
        new.write_text(json.dumps(content))
        new.replace(record)
    except OSError as error:
        with suppress(OSError):
            new.unlink()
        log.info("the digest of the weights is not kept in %s: %s", record, error)
