"""Builds the CUDA device from its sources: `make cuda`.

Decides which compiler is used: nvcc of an installed CUDA (CUDA_HOME, PATH), else that of the PyPI
package nvidia-cuda-nvcc. The library needs a GPU's driver and cuBLAS when it is loaded, not
when it is built.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ENGINE = Path(__file__).resolve().parent.parent
SOURCE_FOLDER = ENGINE / "cuda" / "src"
NATIVE_FOLDER = ENGINE / "native" / "src"
CUDA_SOURCES = tuple(
    SOURCE_FOLDER / name for name in ("model.cu", "kernels.cu", "weights.cpp", "gemm_cublas.cpp")
)
SHARED_SOURCES = (NATIVE_FOLDER / "shape.cpp", NATIVE_FOLDER / "device.cpp")
LIBRARY = ENGINE / "kvasir_engine" / "libkvasir_cuda.so"
ARCHITECTURE = "90"
"""Hopper; its PTX serves newer ones."""

BUILD_TIMEOUT_S = 1_800


def include_folders() -> tuple[Path, Path]:
    """Where the sources' headers lie."""
    return SOURCE_FOLDER, NATIVE_FOLDER


def find_cuda() -> Path:
    """The folder of a CUDA toolkit: it holds bin/nvcc, include/ and lib/ or lib64/.

    Raises:
        FileNotFoundError: there is none, and how to get one.
    """
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc")
    candidates = [Path(home)] if home else []
    candidates += [Path(nvcc).resolve().parent.parent] if nvcc else []
    spec = importlib.util.find_spec("nvidia")
    for location in (spec.submodule_search_locations or []) if spec else []:
        candidates += sorted(Path(location).glob("cu[0-9]*"), reverse=True)
    for folder in candidates:
        if (folder / "bin" / "nvcc").is_file():
            return folder
    raise FileNotFoundError(
        "no nvcc found: install CUDA and set CUDA_HOME, or `pip install nvidia-cuda-nvcc`"
    )


def build(target: Path = LIBRARY, *, cuda: Path | None = None) -> Path:
    """Compiles the device. Raises FileNotFoundError without nvcc, else CalledProcessError."""
    folder = cuda or find_cuda()
    code = f"arch=compute_{ARCHITECTURE},code=[sm_{ARCHITECTURE},compute_{ARCHITECTURE}]"
    # Contraction off, as in the other kernels: fused multiply-adds are written out.
    flags = ["-std=c++20", "-O3", "-gencode", code, "-fmad=false", "-cudart", "static", "-shared"]
    flags += ["-Xcompiler", "-fPIC,-Wall"]
    flags += [f"-I{path}" for path in include_folders()]
    flags += [f"-L{folder / name}" for name in ("lib", "lib64")]
    sources = map(str, (*CUDA_SOURCES, *SHARED_SOURCES))
    command = [str(folder / "bin" / "nvcc"), *flags, *sources, "-o", str(target)]
    subprocess.run(command, check=True, timeout=BUILD_TIMEOUT_S)
    return target


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Build Kvasir's CUDA device.")
    parser.add_argument(
        "--out", type=Path, default=LIBRARY, help="the library (default: %(default)s)"
    )
    options = parser.parse_args()
    try:
        print(f"compiling for sm_{ARCHITECTURE} (about half a minute)", flush=True)
        print(f"built {build(options.out)}")
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"nvcc failed with status {error.returncode}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
