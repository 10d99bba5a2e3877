"""The library is compiled once; models of the path `cuda` then compute with it."""

from pathlib import Path

import pytest
from cuda_libraries import DEVICE_VARIABLE, emulated_library


@pytest.fixture(scope="session", autouse=True)
def cuda_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        library = emulated_library(tmp_path_factory.mktemp("cuda"))
        patch.setenv(DEVICE_VARIABLE, str(library))
        yield library
