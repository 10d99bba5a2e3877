"""A part that a local fleet started dies with the fleet's supervisor, however that ends.

Linux tells a process that its parent died (prctl, PR_SET_PDEATHSIG). The child asks for it itself,
then checks that the parent is still the one that started it, which closes the gap in between.
"""

import ctypes
import os
import signal
import sys

PARENT_ENV = "KVASIR_PARENT_PID"
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask to be killed when the supervisor named in the environment is gone, if one is named."""
    expected = os.environ.pop(PARENT_ENV, "")
    if not expected:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(expected):
        sys.exit("the fleet that started this part is gone")
