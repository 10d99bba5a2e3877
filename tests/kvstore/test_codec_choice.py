"""The choice of a codec for a link: the break-even rule, only among what is allowed, steadily."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvasir_kvstore.core.codecs import CODECS, LEAD, RAW, CodecRate, choose_codec, transfer_s

GB = 1e9
RATES = (
    CodecRate("int8", 1.94, 10 * GB, 10 * GB),
    CodecRate("int4", 3.2, 8 * GB, 8 * GB),
    CodecRate("entropy", 5.0, 0.8 * GB, 1.5 * GB),
)
BLOCKS = 64e6

speeds = st.floats(1e5, 1e11)
sizes = st.floats(1, 1e10)
subsets = st.sets(st.sampled_from(CODECS))
currents = st.sampled_from((RAW, *CODECS))


@pytest.mark.parametrize(
    ("gb_per_s", "codec"), [(0.02, "entropy"), (0.5, "int4"), (1.5, "int4"), (12, RAW), (50, RAW)]
)
def test_slower_links_take_smaller_codecs(gb_per_s: float, codec: str) -> None:
    assert choose_codec(gb_per_s * GB, BLOCKS, RATES, CODECS) == codec


def test_an_unknown_link_stays_raw() -> None:
    assert choose_codec(0, BLOCKS, RATES, CODECS, current="int4") == RAW


@given(speeds, sizes, subsets, currents)
def test_only_what_is_allowed_is_chosen(
    speed: float, size: float, allowed: set[str], current: str
) -> None:
    assert choose_codec(speed, size, RATES, allowed, current=current) in {RAW, *allowed}


@given(speeds, sizes, subsets, currents)
def test_the_choice_is_near_the_best(
    speed: float, size: float, allowed: set[str], current: str
) -> None:
    chosen = choose_codec(speed, size, RATES, allowed, current=current)
    by_name = {rate.name: rate for rate in RATES}
    times = [transfer_s(size, speed, by_name.get(name)) for name in (chosen, RAW, *sorted(allowed))]
    assert times[0] <= min(times) * (1 + LEAD) * (1 + 1e-9)


@given(speeds, sizes, subsets, currents)
def test_the_choice_stays_while_nothing_changes(
    speed: float, size: float, allowed: set[str], current: str
) -> None:
    chosen = choose_codec(speed, size, RATES, allowed, current=current)
    assert choose_codec(speed, size, RATES, allowed, current=chosen) == chosen


def test_a_link_that_jitters_around_break_even_does_not_flap() -> None:
    even = next(
        speed
        for speed in range(10**8, 10**11, 10**7)
        if choose_codec(speed, BLOCKS, RATES, ("int8",), current="") == RAW
    )
    for current in (RAW, "int8"):
        for jitter in (0.97, 1.03):
            chosen = choose_codec(even * jitter, BLOCKS, RATES, ("int8",), current=current)
            assert chosen == current
