"""Names of KV blocks: what a block holds decides its name, and nothing else does.

A block is the K and V of BLOCK_TOKENS consecutive tokens in all layers. Its name is a 128-bit
chained hash, H(parent, token ids), rooted in H(model fingerprint, tenant salt). Invariant: equal
names mean equal bytes, for the same weights, the same layout and the same tenant. Router, engine,
store and simulator all name blocks by this module; where blocks live is left to them. The exception
are names under a `blended_salt`, which promise an approximation.
"""

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from kvasir_kvstore._native import chain_names

BLOCK_TOKENS = 32
NAME_BYTES = 16
ELEMENT_BYTES = {"bfloat16": 2, "float32": 4, "int8": 1}
SCALE_BYTES = {"int8": 4}
"""Of the scale that K and V of one token and head have where elements are codes."""


@dataclass(frozen=True, slots=True)
class KvLayout:
    """How K and V lie in a block: [layer][K then V][kv_head][...], contiguous.

    K of one head is stored transposed, [head_dim][block_tokens], so that scores of one query
    against a block are vector operations over tokens; V is [block_tokens][head_dim]. Where
    elements are int8 codes, each head's K and V is followed by the float32 scales of its tokens.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int = BLOCK_TOKENS
    dtype: str = "bfloat16"
    rope: str = ""
    """Canonical JSON of the rotary embedding's parameters: they are baked into K."""
    exact: bool = True
    """False: blocks may have lost something on their way, and what is computed from them errs."""

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's slice of a block, K and V."""
        head_bytes = self.head_dim * ELEMENT_BYTES[self.dtype] + SCALE_BYTES.get(self.dtype, 0)
        return 2 * self.num_kv_heads * self.block_tokens * head_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all layers."""
        return self.num_layers * self.layer_bytes

    @property
    def digest(self) -> bytes:
        """16 bytes that differ whenever any part of the layout differs."""
        text = json.dumps({"version": 1, **asdict(self)}, sort_keys=True).encode()
        return hashlib.blake2b(text, digest_size=NAME_BYTES, person=b"kvasir-layout").digest()


def fingerprint(weights_digest: bytes, layout: KvLayout) -> bytes:
    """The model's fingerprint, 16 bytes: models that differ in weights or layout share no block."""
    return hashlib.blake2b(
        weights_digest + layout.digest, digest_size=NAME_BYTES, person=b"kvasir-model"
    ).digest()


def root(model_fingerprint: bytes, tenant_salt: bytes = b"") -> bytes:
    """The parent of every first block of one tenant under one model."""
    return hashlib.blake2b(
        model_fingerprint + tenant_salt, digest_size=NAME_BYTES, person=b"kvasir-root"
    ).digest()


def tenant_of(tenant_salt: bytes) -> bytes:
    """What tells a tenant from others where its blocks are counted; none without a salt."""
    if not tenant_salt:
        return b""
    return hashlib.blake2b(tenant_salt, digest_size=NAME_BYTES, person=b"kvasir-tenant").digest()


def blended_salt(
    tenant_salt: bytes,
    token_ids: Sequence[int],
    spans: Sequence[tuple[int, int]],
    recompute_permille: int,
) -> bytes:
    """A salt for blocks whose KV is blended of chunks, and so of no other request's names.

    It depends on all tokens up to the end of the last chunk, and on how they are blended: under it
    equal names mean KV of one quality, and of equal bytes unless a chunk could not be had. Exact
    names stay exact.
    """
    end = spans[-1][1]
    bounds = [bound for span in spans for bound in span]
    digest = hashlib.blake2b(digest_size=NAME_BYTES, person=b"kvasir-blend")
    digest.update(len(tenant_salt).to_bytes(4, "little") + tenant_salt)
    digest.update(struct.pack(f"<{2 + len(bounds)}I", recompute_permille, len(spans), *bounds))
    digest.update(_token_bytes(token_ids[:end]))
    return digest.digest()


def child(parent: bytes, token_bytes: bytes) -> bytes:
    """The name of the block after `parent` that holds these tokens (little-endian int32)."""
    return hashlib.blake2b(parent + token_bytes, digest_size=NAME_BYTES).digest()


def chain(
    parent: bytes, token_ids: Sequence[int] | np.ndarray, block_tokens: int = BLOCK_TOKENS
) -> list[bytes]:
    """Names of the full blocks of `token_ids` that follow `parent` (a root or a block).

    A last block that is not full has no name.
    """
    return chain_names(parent, _token_bytes(token_ids), 4 * block_tokens)


def _token_bytes(token_ids: Sequence[int] | np.ndarray) -> bytes:
    """Little-endian int32. `struct` packs Python's integers ten times faster than numpy does."""
    if isinstance(token_ids, np.ndarray):
        return token_ids.astype("<i4", copy=False).tobytes()
    return struct.pack(f"<{len(token_ids)}i", *token_ids)
