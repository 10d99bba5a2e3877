"""OpenVINO GenAI as a peer of `kvasir bench engine`: MODEL_DIR WEIGHTS KV THREADS.

Runs in the peer's virtual environment (openvino-genai, optimum-intel, nncf). Reads a line per case:
sequences, first position, end, steps; answers with seconds.
"""

import hashlib
import subprocess
import sys
import time
from pathlib import Path

sys.path[:] = [path for path in sys.path if Path(path) != Path(__file__).parent]
import numpy as np  # noqa: E402
import openvino  # noqa: E402
import openvino_genai as genai  # noqa: E402

FORMATS = {"bf16": "fp16", "int8": "int8", "int4": "int4"}
KV_PRECISIONS = {"bf16": "bf16", "int8": "u8"}
BF16_FLAGS = {"avx512_bf16", "amx_bf16"}
TOKENS_MAX = 16 * 544
CACHE_GIB = 3


def converted(folder: Path, weights: str) -> Path:
    """The folder's model as OpenVINO's own exporter makes it, kept in the virtual environment."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    target = Path(sys.prefix) / "models" / f"{name}-{weights}"
    if not (target / "openvino_model.bin").is_file():
        command = [Path(sys.prefix) / "bin" / "optimum-cli", "export", "openvino"]
        command += ["--model", folder, "--task", "text-generation-with-past"]
        command += ["--weight-format", FORMATS[weights], target]
        subprocess.run(list(map(str, command)), check=True, stdout=sys.stderr)
    return target


def properties(kv: str, num_threads: int) -> dict[str, object]:
    """Of the processor: bf16 only where it computes with it."""
    values: dict[str, object] = {"INFERENCE_NUM_THREADS": num_threads}
    flags = set(Path("/proc/cpuinfo").read_text().split())
    has_bf16 = bool(flags & BF16_FLAGS)
    values["INFERENCE_PRECISION_HINT"] = "bf16" if has_bf16 else "f32"
    values["KV_CACHE_PRECISION"] = KV_PRECISIONS[kv] if has_bf16 or kv == "int8" else "f16"
    return values


class Cases:
    """Requests stepped by hand, so that each step's time is known."""

    def __init__(self, folder: Path, kv: str, num_threads: int) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GIB
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = TOKENS_MAX
        self._pipeline = genai.ContinuousBatchingPipeline(
            folder, scheduler, "CPU", properties(kv, num_threads)
        )
        self._num_requests = 0

    def seconds(self, count: int, length: int, num_new: int) -> list[float]:
        """Of each step of `count` requests of `length` tokens that make `num_new` more."""
        config = genai.GenerationConfig(max_new_tokens=num_new, ignore_eos=True, do_sample=False)
        handles = []
        for _ in range(count):
            ids = (np.arange(length, dtype=np.int64) * 7919 % 1000)[None]
            self._num_requests += 1
            handles.append(
                self._pipeline.add_request(self._num_requests, openvino.Tensor(ids), config)
            )
        taken = []
        while self._pipeline.has_non_finished_requests():
            began = time.perf_counter()
            self._pipeline.step()
            taken.append(time.perf_counter() - began)
        return taken


def main() -> None:
    """Serve cases until the input ends."""
    folder, weights, kv, num_threads = sys.argv[1:]
    cases = Cases(converted(Path(folder), weights), kv, int(num_threads))
    print("ready", flush=True)
    for line in sys.stdin:
        count, start, end, steps = map(int, line.split())
        if start == 0:
            print(sum(cases.seconds(1, end, 1)), flush=True)
        else:
            print(sum(cases.seconds(count, start, steps + 1)[-steps:]), flush=True)


main()
