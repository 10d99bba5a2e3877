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
from kvasir_engine.digests import NAME as RECORD_NAME
from kvasir_engine.logits import sequence_logits
from kvasir_engine.model import load_model
from kvasir_engine.packed import FOLDER, HEADER_BYTES

IDS = np.arange(40, dtype=np.int32)


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files just copied count as old."""
    monkeypatch.setattr("kvasir_engine.digests.SETTLED_S", 0.0)


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


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_a_second_load_maps_what_the_first_has_packed(folder: Path, weights: str) -> None:
    first, stages = load(folder, weights)
    assert stages == {"digest", "pack"}
    second, stages = load(folder, weights)
    assert stages == {"read"}
    assert np.array_equal(first, second)


def test_kept_weights_are_shared_memory_that_nobody_writes(folder: Path) -> None:
    load(folder)
    model = load_model(folder, num_threads=1, weights="int8", keeps_packed=True)
    assert np.array_equal(model.native.packed, np.fromfile(kept(folder), np.uint8)[HEADER_BYTES:])
    lines = Path("/proc/self/maps").read_text().splitlines()
    (line,) = (line for line in lines if line.endswith(str(kept(folder))))
    assert line.split()[1] == "r--s"


def test_plain_loads_keep_nothing_and_use_nothing(folder: Path) -> None:
    load_model(folder, num_threads=1, weights="int8")
    assert not (folder / FOLDER).exists()
    load(folder)
    kept(folder).write_bytes(b"not read")
    load_model(folder, num_threads=1, weights="int8")
    assert kept(folder).read_bytes() == b"not read"


@pytest.mark.parametrize("model", ["llama-gqa-tied", "mixtral-moe", "qwen3-qknorm"])
def test_every_family_computes_the_same_from_what_was_kept(tmp_path: Path, model: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(GOLDENS / model, folder)
    assert np.array_equal(load(folder, "bf16")[0], load(folder, "bf16")[0])


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
    folder: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    expected, _ = load(folder)
    whole = kept(folder).read_bytes()
    damage(kept(folder))
    with caplog.at_level("INFO"):
        logits, stages = load(folder)
    assert "pack" in stages
    assert str(kept(folder)) in caplog.text
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


def test_a_file_written_again_has_its_digest_taken_again(folder: Path) -> None:
    """Though size, contents and the time that programs set are as before."""
    load(folder)
    file = folder / "model.safetensors"
    times = file.stat()
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert load(folder)[1] == {"digest", "read"}
    assert load(folder)[1] == {"read"}


def test_a_digest_of_what_has_just_changed_is_not_remembered(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second change in the same tick of the file system's clock would not show."""
    monkeypatch.setattr("kvasir_engine.digests.SETTLED_S", 3600.0)
    load(folder)
    assert load(folder)[1] == {"digest", "read"}


def test_a_file_that_changes_while_it_is_read_is_not_remembered(folder: Path) -> None:
    file = folder / "model.safetensors"
    changed = file.with_suffix(".changed")
    changed.write_bytes(file.read_bytes()[:-1000] + bytes(1000))

    def replace(stage: str, _done: int, _total: int) -> None:
        if stage == "digest" and changed.exists():
            changed.replace(file)

    load_model(folder, num_threads=1, weights="int8", keeps_packed=True, progress=replace)
    assert "digest" in load(folder)[1]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": {}, "digest": "xyz"}', "\xff"])
def test_a_broken_record_of_the_digest_is_a_miss(folder: Path, text: str) -> None:
    load(folder)
    (folder / FOLDER / RECORD_NAME).write_bytes(text.encode("latin1"))
    assert load(folder)[1] == {"digest", "read"}


def test_a_folder_that_cannot_be_written_serves_all_the_same(folder: Path) -> None:
    expected, _ = load(folder)
    shutil.rmtree(folder / FOLDER)
    (folder / FOLDER).write_text("in the way, even of root")
    logits, _ = load(folder)
    assert np.array_equal(logits, expected)


def test_a_full_disk_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_descriptor: int, _data: object, _offset: int) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr("kvasir_engine.packed.os.pwrite", fail)
        load(folder)
    assert [file.name for file in (folder / FOLDER).iterdir()] == [RECORD_NAME]


def test_a_disk_with_little_room_is_left_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(
        "kvasir_engine.packed.shutil.disk_usage", lambda _path: usage._replace(free=1000)
    )
    load(folder)
    assert not kept(folder).exists()


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
