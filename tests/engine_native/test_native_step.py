"""What a step announces, and what it refuses."""

import ctypes
import platform
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_models import GOLDENS
from kvasir_engine import _native
from kvasir_engine.model import LoadedModel, load_model, new_kv_arrays
from step_builders import Part, run_step, step_arguments

NUM_BLOCKS = 8
SYS_FUTEX = 202
FUTEX_WAIT = 0


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model(GOLDENS / "llama-gqa-tied", num_threads=2)


def arguments(model: LoadedModel, **changes: Any) -> dict[str, Any]:
    """A good step of 40 tokens in blocks 3 and 5, with some arguments replaced."""
    new_kv_arrays(model, NUM_BLOCKS)
    return step_arguments(model, Part(np.arange(40), 0, 40, (3, 5))) | changes


def test_completed_blocks_are_ready_with_all_layers(model: LoadedModel) -> None:
    arrays = new_kv_arrays(model, NUM_BLOCKS)
    step = step_arguments(model, Part(np.arange(80), 0, 80, (6, 1, 4)))
    model.native.forward(**step | {"completes": np.array([6, 1], np.int32)})
    assert arrays.ready.tolist() == [0, 3, 0, 0, 0, 0, 3, 0]
    assert arrays.progress[0] == model.config.num_layers


def test_nothing_is_announced_without_completed_blocks(model: LoadedModel) -> None:
    arrays = new_kv_arrays(model, NUM_BLOCKS)
    run_step(model, Part(np.arange(40), 0, 40, (3, 5)))
    assert not arrays.ready.any()
    assert arrays.progress[0] == 0


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/self/syscall").exists(),
    reason="the kernel does not show system calls, or numbers them otherwise",
)
def test_a_sleeper_on_the_progress_word_wakes(model: LoadedModel) -> None:
    arrays = new_kv_arrays(model, NUM_BLOCKS)
    libc = ctypes.CDLL(None, use_errno=True)
    woken: list[int] = []

    def sleep() -> None:
        limit = (ctypes.c_long * 2)(30, 0)
        word = ctypes.c_void_p(arrays.progress.ctypes.data)
        woken.append(libc.syscall(SYS_FUTEX, word, FUTEX_WAIT, 0, limit, None, 0))

    sleeper = threading.Thread(target=sleep)
    sleeper.start()
    address = hex(arrays.progress.ctypes.data)
    state = Path(f"/proc/self/task/{sleeper.native_id}/syscall")
    while address not in state.read_text():
        assert sleeper.is_alive()
    step = step_arguments(model, Part(np.arange(32), 0, 32, (2,)))
    model.native.forward(**step | {"completes": np.array([2], np.int32)})
    sleeper.join()
    assert woken == [0]


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


BAD_STEPS: dict[str, tuple[dict[str, Any], str]] = {
    "token id too large": ({"token_ids": np.full(40, 512, np.int32)}, "vocabulary"),
    "negative token id": ({"token_ids": np.full(40, -1, np.int32)}, "vocabulary"),
    "counts too small": ({"seq_token_counts": i32(39)}, "add up"),
    "count of zero": (
        {"seq_token_counts": i32(40, 0), "block_tables": np.array([[3, 5], [3, 5]], np.int32)},
        "positive",
    ),
    "counts that overflow": (
        {"seq_token_counts": i32(2**31 - 1, 2**31 - 1), "block_tables": np.zeros((2, 2), np.int32)},
        "add up",
    ),
    "block beyond the pool": ({"block_tables": i32(3, NUM_BLOCKS)[None]}, "outside the pool"),
    "negative block": ({"block_tables": i32(3, -1)[None]}, "outside the pool"),
    "table too short": ({"block_tables": i32(3)[None]}, "block table"),
    "negative position": ({"positions": np.arange(-1, 39, dtype=np.int32)}, "block table"),
    "position that overflows": (
        {"positions": np.arange(2**31 - 40, 2**31, dtype=np.int64).astype(np.int32)},
        "block table",
    ),
    "gap in positions": ({"positions": np.arange(0, 80, 2, dtype=np.int32)}, "consecutive"),
    "output row beyond the step": (
        {"output_rows": i32(40), "logits": np.empty((1, 512), np.float32)},
        "output row",
    ),
    "completed block beyond the pool": ({"completes": i32(NUM_BLOCKS)}, "completed block"),
    "arrived block beyond the pool": ({"arrived": i32(NUM_BLOCKS)}, "arrived block"),
    "positions of another length": ({"positions": i32(0)}, "as long as"),
    "no tokens": (
        {"token_ids": i32(), "positions": i32(), "seq_token_counts": i32(),
         "block_tables": np.empty((0, 2), np.int32)},
        "at least one token",
    ),
    "logits with too few rows": ({"logits": np.empty((39, 512), np.float32)}, "one row per"),
    "logits with too few columns": ({"logits": np.empty((40, 511), np.float32)}, "one column per"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_STEPS, ids=str)
def test_bad_step_is_refused_and_changes_nothing(model: LoadedModel, case: str) -> None:
    changes, text = BAD_STEPS[case]
    step = arguments(model, **changes)
    arrays = new_kv_arrays(model, NUM_BLOCKS)
    with pytest.raises(ValueError, match=text):
        model.native.forward(**step)
    assert not arrays.data.any()


BAD_TYPES: dict[str, dict[str, Any]] = {
    "ids of 64 bits": {"token_ids": np.arange(40)},
    "logits of 64 bits": {"logits": np.empty((40, 512))},
    "logits with gaps": {"logits": np.empty((40, 1024), np.float32)[:, ::2]},
    "read-only logits": {"logits": np.broadcast_to(np.float32(0), (40, 512))},
    "flat table": {"block_tables": np.zeros(2, np.int32)},
}


@pytest.mark.parametrize("case", BAD_TYPES, ids=str)
def test_arrays_of_another_kind_are_refused(model: LoadedModel, case: str) -> None:
    with pytest.raises(TypeError):
        model.native.forward(**arguments(model, **BAD_TYPES[case]))


def test_step_without_a_pool_is_refused() -> None:
    fresh = load_model(GOLDENS / "qwen2-bias", num_threads=1)
    with pytest.raises(ValueError, match="no KV pool"):
        fresh.native.forward(**step_arguments(fresh, Part(np.arange(3), 0, 3, (0,))))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d, r, p: (d[:, :-1].copy(), r, p), "block size"),
        (lambda d, r, p: (d, r[:-1], p), "one entry per block"),
        (lambda d, r, p: (d, r, np.zeros(2, np.uint32)), "one entry"),
        (lambda d, r, p: (d[:0], r[:0], p), "at least one block"),
    ],
    ids=["other block size", "short ready", "long progress", "no block"],
)
def test_pool_of_another_shape_is_refused(
    model: LoadedModel, change: Callable[..., tuple[Any, ...]], text: str
) -> None:
    arrays = new_kv_arrays(model, NUM_BLOCKS)
    with pytest.raises(ValueError, match=text):
        model.native.attach_pool(*change(arrays.data, arrays.ready, arrays.progress))


def test_a_second_step_at_the_same_time_is_refused_or_runs_after(model: LoadedModel) -> None:
    new_kv_arrays(model, NUM_BLOCKS)
    problems: list[str] = []

    def run() -> None:
        for _ in range(20):
            try:
                run_step(model, Part(np.arange(40), 0, 40, (3, 5)))
            except ValueError as error:
                problems.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(problems) <= {"the model is already computing a step"}


def test_unknown_thread_count_and_path_are_refused() -> None:
    config = {"num_layers": 1}
    with pytest.raises(ValueError, match="lacks the field"):
        _native.Model(config, {}, isa="scalar", num_threads=1)
    with pytest.raises(ValueError, match="unknown kernel path"):
        _native.kv_element_bytes("avx9")
