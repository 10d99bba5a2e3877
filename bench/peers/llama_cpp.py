"""llama.cpp as a peer of `kvasir bench engine`: MODEL_DIR WEIGHTS KV THREADS (KV: 16 bits).

Runs in the peer's virtual environment (llama-cpp-python, gguf, numpy). Reads a line per case:
sequences, first position, end, steps; answers with seconds.
"""

import ctypes
import sys
import tempfile
import time
from pathlib import Path

sys.path[:] = [path for path in sys.path if Path(path) != Path(__file__).parent]
import llama_cpp as llama  # noqa: E402

sys.path.append(str(Path(__file__).parent))
from gguf_model import write_gguf  # noqa: E402

FILE_TYPES = {"int8": llama.LLAMA_FTYPE_MOSTLY_Q8_0, "int4": llama.LLAMA_FTYPE_MOSTLY_Q4_0}
PROMPT_TOKENS_MAX = 2048
SEQUENCES_MAX = 16
SEQUENCE_TOKENS_MAX = 544


def load_model(folder: Path, weights: str, num_threads: int, scratch: Path):
    """The folder's model, quantised by llama.cpp itself."""
    path = scratch / "bf16.gguf"
    write_gguf(folder, path)
    if weights != "bf16":
        options = llama.llama_model_quantize_default_params()
        options.ftype, options.nthread = FILE_TYPES[weights], num_threads
        target = scratch / "quantised.gguf"
        failed = llama.llama_model_quantize(
            str(path).encode(), str(target).encode(), ctypes.byref(options)
        )
        assert not failed, "llama.cpp did not quantise the model"
        path = target
    return llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())


def new_context(model, num_threads: int, *, num_sequences: int, sequence_tokens: int):
    """KV of its own for each sequence."""
    options = llama.llama_context_default_params()
    options.n_ctx = num_sequences * sequence_tokens
    options.n_batch, options.n_seq_max = PROMPT_TOKENS_MAX, num_sequences
    options.n_threads = options.n_threads_batch = num_threads
    return llama.llama_init_from_model(model, options)


def compute(context, batch, tokens) -> None:
    """One call over (sequence, position, wants logits) of each token."""
    batch.n_tokens = len(tokens)
    for i, (sequence, position, has_output) in enumerate(tokens):
        batch.token[i] = (i * 7919) % 1000
        batch.pos[i] = position
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = sequence
        batch.logits[i] = has_output
    failed = llama.llama_decode(context, batch)
    assert not failed, f"llama_decode says {failed}"


class Cases:
    """Prompts in one KV memory, batches in another whose contexts are computed once."""

    def __init__(self, model, num_threads: int) -> None:
        self._batch = llama.llama_batch_init(PROMPT_TOKENS_MAX, 0, 1)
        self._prompts = new_context(
            model, num_threads, num_sequences=1, sequence_tokens=PROMPT_TOKENS_MAX
        )
        self._batches = new_context(
            model, num_threads, num_sequences=SEQUENCES_MAX, sequence_tokens=SEQUENCE_TOKENS_MAX
        )
        self._num_computed = 0

    def prompt(self, length: int) -> float:
        """Seconds of a prompt."""
        llama.llama_memory_clear(llama.llama_get_memory(self._prompts), True)
        began = time.perf_counter()
        compute(self._prompts, self._batch, [(0, p, p == length - 1) for p in range(length)])
        return time.perf_counter() - began

    def decode(self, count: int, start: int, steps: int) -> float:
        """Seconds of so many steps after a context of `start` tokens each."""
        for sequence in range(self._num_computed, count):
            context = [(sequence, p, p == start - 1) for p in range(start)]
            compute(self._batches, self._batch, context)
            self._num_computed = sequence + 1
        began = time.perf_counter()
        for step in range(steps):
            compute(self._batches, self._batch, [(s, start + step, True) for s in range(count)])
        seconds = time.perf_counter() - began
        memory = llama.llama_get_memory(self._batches)
        for sequence in range(count):
            llama.llama_memory_seq_rm(memory, sequence, start, -1)
        return seconds


def main() -> None:
    """Serve cases until the input ends."""
    llama.llama_backend_init()
    num_threads = int(sys.argv[4])
    with tempfile.TemporaryDirectory() as scratch:
        model = load_model(Path(sys.argv[1]), sys.argv[2], num_threads, Path(scratch))
        cases = Cases(model, num_threads)
        print("ready", flush=True)
        for line in sys.stdin:
            count, start, end, steps = map(int, line.split())
            is_prompt = start == 0
            print(cases.prompt(end) if is_prompt else cases.decode(count, start, steps), flush=True)


main()
