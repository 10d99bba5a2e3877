"""The certificate of a local fleet: made anew each time it starts, one for all of its parts."""

import os
from pathlib import Path

from kvasir_operator.certificates import make_bundle, utc_now
from kvasir_proto.links import AUTHORITIES, CERTIFICATE, KEY

from kvasir_cli.fleet.state import TLS

DNS_NAME = "fleet.kvasir.internal"


def make_tls_dir(run_folder: Path) -> Path:
    """A folder that only this user can read, with what `--tls-dir` takes."""
    bundle = make_bundle(DNS_NAME, now=utc_now())
    folder = run_folder / TLS
    folder.mkdir(mode=0o700, exist_ok=True)
    files = {CERTIFICATE: bundle.certificate, KEY: bundle.key, AUTHORITIES: bundle.ca}
    for name, content in files.items():
        (folder / name).unlink(missing_ok=True)
        with open(os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
            file.write(content)
    return folder
