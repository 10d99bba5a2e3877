"""Names of blocks by the native chain: the same as hashlib's, for every length and input."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvasir_kvstore._native import chain_names
from kvasir_kvstore.core import block


@given(
    st.binary(min_size=16, max_size=16),
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=300),
    st.integers(1, 80),
)
def test_a_chain_is_blake2b_block_by_block(
    parent: bytes, tokens: list[int], block_tokens: int
) -> None:
    data, step = np.asarray(tokens, "<i4").tobytes(), 4 * block_tokens
    expected, before = [], parent
    for start in range(0, len(data) - step + 1, step):
        before = block.child(before, data[start : start + step])
        expected.append(before)
    assert block.chain(parent, tokens, block_tokens) == expected
    assert block.chain(parent, tuple(tokens), block_tokens) == expected
    assert block.chain(parent, np.asarray(tokens, "<i4"), block_tokens) == expected
    assert block.chain(parent, np.asarray(tokens, "<i8"), block_tokens) == expected


def test_what_cannot_be_named_is_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        chain_names(b"short", b"", 4)
    with pytest.raises(ValueError, match="positive"):
        chain_names(b"x" * 16, b"", 0)
