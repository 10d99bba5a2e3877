"""Packed weights kept beside the model: used when they fit, replaced when they do not."""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from golden_models import GOLDENS
from kvasir_engine.logits import sequence_logits
from kvasir_engine.model import load_model
from kvasir_engine.packed import FOLDER, HEADER_BYTES

IDS = np.arange(40, dtype=np.int32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "model"
    shutil.copytree(GOLDENS / "qwen2-bias", target)
    return target


def kept(folder: Path, weights: str = "int8") -> Path:
    return folder / FOLDER / f"{weights}.packed"


def load(folder: Path, weights: str = "int8") -> tuple[np.ndarray, set[str]]:
    """(logits, stages that the load went through)"""
    stages = set()
    model = load_model(
        folder,
        num_threads=2,
        weights=weights,
        keeps_packed=True,
        progress=lambda stage, _done, _total: stages.add(stage),
    )
    return sequence_logits(model, IDS, chunk=len(IDS)), stages


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_second_load_reads_what_the_first_has_packed(folder: Path, weights: str) -> None:
    first, stages = load(folder, weights)
    assert stages == {"digest", "pack"}
    second, stages = load(folder, weights)
    assert stages == {"digest", "read"}
    assert np.array_equal(first, second)


def test_bf16_weights_and_plain_loads_keep_nothing(folder: Path) -> None:
    load(folder, "bf16")
    load_model(folder, num_threads=1, weights="int8")
    assert not (folder / FOLDER).exists()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def lengthen(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)


def flip(offset: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[offset] ^= 1
        path.write_bytes(data)

    return change


@pytest.mark.parametrize(
    "damage",
    [cut, empty, lengthen, flip(0), flip(20), flip(50), flip(HEADER_BYTES), flip(HEADER_BYTES + 9)],
    ids=["cut", "empty", "longer", "magic", "key", "checksum", "first byte", "a later byte"],
)
def test_a_damaged_file_is_packed_again_and_replaced(
    folder: Path, damage: Callable[[Path], None]
) -> None:
    expected, _ = load(folder)
    whole = kept(folder).read_bytes()
    damage(kept(folder))
    logits, stages = load(folder)
    assert "pack" in stages
    assert np.array_equal(logits, expected)
    assert kept(folder).read_bytes() == whole


def test_other_weights_are_not_served_from_an_old_file(folder: Path) -> None:
    old, _ = load(folder)
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1000:] = bytes(1000)
    file.write_bytes(data)
    changed, stages = load(folder)
    assert "pack" in stages
    assert not np.array_equal(changed, old)
    again, stages = load(folder)
    assert "read" in stages
    assert np.array_equal(changed, again)


def test_a_folder_that_cannot_be_written_serves_all_the_same(folder: Path) -> None:
    expected, _ = load(folder)
    shutil.rmtree(folder / FOLDER)
    (folder / FOLDER).write_text("in the way, even of root")
    logits, _ = load(folder)
    assert np.array_equal(logits, expected)


def test_a_full_disk_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_descriptor: int, _data: object) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr("kvasir_engine.packed.os.write", fail)
        load(folder)
    assert not list((folder / FOLDER).iterdir())


def test_one_process_at_a_time_writes(folder: Path) -> None:
    """Of workers that load at once; what a killed one has left is written over."""
    (folder / FOLDER).mkdir()
    unfinished = kept(folder).with_suffix(".new")
    unfinished.write_bytes(b"left by a killed process")
    with unfinished.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        load(folder)
        assert not kept(folder).exists()
    load(folder)
    assert kept(folder).exists()
    assert not unfinished.exists()
