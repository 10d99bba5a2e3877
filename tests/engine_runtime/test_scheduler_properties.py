"""The scheduler under random histories."""

from histories import History
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    num_blocks=st.integers(3, 16),
    budget=st.sampled_from([1, 3, 7, 32, 64, 200]),
    max_running=st.integers(1, 6),
)
def test_invariants_hold_through_any_history(
    seed: int, num_blocks: int, budget: int, max_running: int
) -> None:
    history = History(seed, num_blocks=num_blocks, budget=budget, max_running=max_running)
    history.run(400)
    history.finish()


def test_histories_reach_what_they_are_to_test() -> None:
    history = History(7, num_blocks=10, budget=64, max_running=5)
    history.run(4000)
    roster = history.scheduler.roster
    assert roster.num_preemptions >= 10
    assert roster.tokens_cached > 1000
    assert len(history.opened) > 20
    assert roster.num_ended > 100
    history.finish()
