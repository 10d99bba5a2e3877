"""The CUDA device as a library: for a GPU where there is one, else run by a slow model of CUDA."""

import os
import subprocess
from pathlib import Path

from cuda_build import CUDA_SOURCES, SHARED_SOURCES, include_folders

DEVICE_VARIABLE = "KVASIR_CUDA_LIBRARY"
EMULATED = ("gemm_emulated.cpp",)


def emulated_library(folder: Path) -> Path:
    """Compiles the device's sources for the processor; a GPU's library, if one is set, instead."""
    if DEVICE_VARIABLE in os.environ:
        return Path(os.environ[DEVICE_VARIABLE])
    target = folder / "libkvasir_cuda_emulated.so"
    sources = [path for path in CUDA_SOURCES if path.name != "gemm_cublas.cpp"]
    sources += [CUDA_SOURCES[0].parent / name for name in EMULATED]
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wextra"]
    command = [os.environ.get("CXX", "g++"), *flags, "-Wno-unknown-pragmas", "-Werror"]
    command += ["-DKVASIR_CUDA_EMULATED", *(f"-I{path}" for path in include_folders())]
    command += ["-x", "c++", *map(str, [*sources, *SHARED_SOURCES]), "-o", str(target)]
    subprocess.run(command, check=True, timeout=600)
    return target
