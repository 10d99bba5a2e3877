"""A model folder becomes a model that computes: config, weights, kernel path, fingerprint.

Decides the kernel path (the best this processor runs, or KVASIR_ISA) and the KV element type that
goes with it. Invariant: equal fingerprints mean KV blocks that mean the same.
"""

import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
from kvasir_kvstore.core.block import KvLayout, fingerprint
from kvasir_proto.errors import KvasirError, Reason

from kvasir_engine import _native
from kvasir_engine.config import read_config
from kvasir_engine.decoder import ModelConfig
from kvasir_engine.digests import remembered_digest
from kvasir_engine.fields import malformed
from kvasir_engine.formats import KvFormat, WeightFormat
from kvasir_engine.memory import weights_bytes
from kvasir_engine.multimodal import text_tensors
from kvasir_engine.packed import PackedFile, packed_file
from kvasir_engine.tensors import check_tensors, native_tensors
from kvasir_engine.weights import (
    DIGEST_BYTES,
    Progress,
    WeightFile,
    all_tensors,
    open_weights,
    weights_digest,
)

log = logging.getLogger(__name__)

ISA_VARIABLE = "KVASIR_ISA"
WEIGHT_FORMATS = get_args(WeightFormat)
CUDA_PATH = "cuda"
EMBEDDINGS = "model.embed_tokens.weight"
"""All that is read of the source where packed weights were kept."""
ARITHMETIC: dict[WeightFormat, str] = {"bf16": "", "int8": "int8 balanced", "int4": "int4"}
"""Part of the fingerprint: another name once a format's numbers are rounded in another way, as KV
of the two may still be in KV nodes, or in workers of the version before."""
KV_ARITHMETIC: dict[KvFormat, str] = {"bf16": "", "int8": "integers"}
"""The same of attention over KV."""
INT8_KV_HEAD_DIM_MAX = 512
"""Of wider heads, sums of attention over int8 KV could overflow 32 bits."""
BALANCED: tuple[WeightFormat, ...] = ("int8",)
"""Formats for which columns of weights are scaled to fit their inputs as they are packed."""
KV_DTYPES = {1: "int8", 2: "bfloat16", 4: "float32"}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory, ready for `native.attach_pool` and `native.forward`."""

    native: _native.Model
    config: ModelConfig
    layout: KvLayout
    fingerprint: bytes
    weights_bytes: int
    """Bytes of packed weights."""


@dataclass(frozen=True, slots=True)
class PackOptions:
    """What the native model takes beside weights."""

    isa: str
    kv: KvFormat
    weights: WeightFormat
    num_threads: int
    is_balanced: bool


@dataclass(frozen=True, slots=True)
class KvArrays:
    """Plain KV memory with the arrays of a BlockPool: for tools that serve no peers."""

    data: np.ndarray
    ready: np.ndarray
    progress: np.ndarray


def choose_path(isa: str | None = None) -> str:
    """The kernel path: `isa`, else KVASIR_ISA, else the best that runs here.

    Raises:
        KvasirError: it does not run here, or is one of the slow models that are for tests.
    """
    name = isa or os.environ.get(ISA_VARIABLE) or _native.cpu_paths()[-1]
    if name in _native.model_paths():
        known = ", ".join(_native.cpu_paths())
        text = f"kernel path {name!r} is a slow model of instructions, for tests; here run: {known}"
        raise KvasirError(Reason.UNSUPPORTED, text, param=ISA_VARIABLE)
    try:
        _native.kv_element_bytes(name)
    except ValueError as error:
        raise KvasirError(Reason.UNSUPPORTED, str(error), param=ISA_VARIABLE) from error
    return name


def open_model(path: Path | str) -> tuple[ModelConfig, list[WeightFile]]:
    """What the folder at `path` holds, from config.json and the files' headers.

    Raises KvasirError that names what is missing, unsupported, or does not fit the config.json.
    """
    config = read_config(path)
    files = [replace(file, entries=text_tensors(file.entries)) for file in open_weights(path)]
    shapes = {name: entry.shape for file in files for name, entry in file.entries.items()}
    check_tensors(config, shapes)
    return config, files


def load_model(
    path: Path | str,
    *,
    num_threads: int,
    isa: str | None = None,
    weights: WeightFormat = "bf16",
    kv: KvFormat = "bf16",
    keeps_packed: bool = False,
    before_packing: Callable[[KvLayout, bytes], object] = lambda *_: None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load the folder at `path`. Raises KvasirError that says what is wrong with it.

    `weights` is the format they are computed with, one of WEIGHT_FORMATS. `keeps_packed`: packed
    weights and their digest are kept beside the model for the next load. `before_packing` is given
    the layout and the fingerprint; what it raises ends the load. `progress` is called with
    ("digest" | "read" | "pack", done bytes, total bytes).
    """
    # 1. What it is, and whether this engine computes it.
    if weights not in WEIGHT_FORMATS:
        known = ", ".join(WEIGHT_FORMATS)
        raise KvasirError(Reason.UNSUPPORTED, f"no weight format {weights!r}; there are: {known}")
    config, files = open_model(path)
    if kv == "int8" and config.head_dim > INT8_KV_HEAD_DIM_MAX:
        text = f"int8 KV takes heads of up to {INT8_KV_HEAD_DIM_MAX} values, not {config.head_dim}"
        raise KvasirError(Reason.UNSUPPORTED, text)
    name = choose_path(isa)
    # 2. Its digest; where it is taken now, this also brings the files into the page cache.
    if keeps_packed:
        source = remembered_digest(path, files, num_threads=num_threads, progress=progress)
    else:
        source = weights_digest(files, num_threads=num_threads, progress=progress)
    digest = hashlib.blake2b(
        _numerics(config, weights).encode() + source, digest_size=DIGEST_BYTES
    ).digest()
    layout = config.layout(KV_DTYPES[_native.kv_element_bytes(name, kv)])
    mark = fingerprint(_attending(digest, kv), layout)
    before_packing(layout, mark)
    # 3. Its weights, packed for the path, or as an earlier load has kept them.
    kept = None
    if keeps_packed and name != CUDA_PATH:
        kept = packed_file(path, digest, weights, weights_bytes(config, weights))
    how = PackOptions(
        isa=name, kv=kv, weights=weights, num_threads=num_threads, is_balanced=weights in BALANCED
    )
    native = _pack(config, files, how, kept, progress)
    assert native.layer_bytes == layout.layer_bytes, "native and Python disagree on the KV layout"
    log.info("loaded %s (%s, %d bytes of weights)", path, name, native.weight_bytes)
    return LoadedModel(native, config, layout, mark, native.weight_bytes)


def new_kv_arrays(model: LoadedModel, num_blocks: int) -> KvArrays:
    """KV memory of `num_blocks` blocks, attached to the model."""
    arrays = KvArrays(
        data=np.zeros((num_blocks, model.layout.block_bytes), np.uint8),
        ready=np.zeros(num_blocks, np.uint32),
        progress=np.zeros(1, np.uint32),
    )
    model.native.attach_pool(arrays.data, arrays.ready, arrays.progress)
    return arrays


def _attending(digest: bytes, kv: KvFormat) -> bytes:
    """The digest with how KV is attended, which packed weights do not depend on."""
    arithmetic = KV_ARITHMETIC[kv].encode()
    if not arithmetic:
        return digest
    return hashlib.blake2b(arithmetic + digest, digest_size=DIGEST_BYTES).digest()


def _numerics(config: ModelConfig, weights: WeightFormat) -> str:
    """What computed numbers depend on besides the weights' bytes."""
    how = ARITHMETIC[weights]
    return f"{config.numerics()} weights={how}" if how else config.numerics()


def _pack(
    config: ModelConfig,
    files: list[WeightFile],
    how: PackOptions,
    kept: PackedFile | None,
    progress: Progress | None,
) -> _native.Model:
    def report(done: int, total: int) -> None:
        for file in files:
            file.release()
        if progress is not None:
            progress("pack", done, total)

    packed = None
    if kept is not None:
        packed = kept.map(num_threads=how.num_threads, progress=progress)
    names = {EMBEDDINGS} if packed is not None else None
    tensors = native_tensors(config, all_tensors(files, names))
    try:
        native = _native.Model(
            config.native_shape(), tensors, progress=report, kept=packed, **asdict(how)
        )
    except ValueError as error:
        raise malformed(str(error)) from error
    if packed is None:
        report(native.weight_bytes, native.weight_bytes)
        if kept is not None:
            kept.write(native.packed, num_threads=how.num_threads)
    return native
