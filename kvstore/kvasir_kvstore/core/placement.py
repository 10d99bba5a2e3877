"""Where a chain of blocks is kept, and who has the longest leading run of it.

Nodes are ranked by weighted rendezvous hashing on the chain's first block (Thaler and
Ravishankar, 1998; weights: Schindelhauer and Schomaker, 2005): every worker ranks them alike
without talking, and a node that comes or goes moves only its own share. Which nodes live is left to
the caller.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Holder = TypeVar("Holder")
SLOW_START_MS = 60_000
SLOW_START_STEPS = 8


@dataclass(frozen=True, slots=True)
class Run(Generic[Holder]):
    """`count` names from index `first` on, all at one holder."""

    holder: Holder
    first: int
    count: int

    @property
    def end(self) -> int:
        """Index after the last name."""
        return self.first + self.count


def rank_nodes(chain_head: bytes, weights: Mapping[str, float]) -> list[str]:
    """The nodes, best first, for the chain that begins with this block.

    Each node's number, drawn from the chain and its name, is exponential at the rate of its weight;
    the least comes first, so that a node is first for its share of the weights. A node whose weight
    grows gains chains and loses none, and all others keep their order.
    """

    def number(node: str) -> float:
        key = len(chain_head).to_bytes(2, "big") + chain_head + node.encode()
        digest = hashlib.blake2b(key, digest_size=8, person=b"kvasir-place").digest()
        uniform = (int.from_bytes(digest, "big") + 1) / (1 << 64)
        return -math.log(uniform) / weights[node]

    return sorted((node for node in weights if weights[node] > 0), key=lambda n: (number(n), n))


def node_weight(bytes_capacity: int, *, age_ms: int, oldest_age_ms: int) -> float:
    """What a node counts for: its capacity, or, if it joined others, a part that grows in steps.

    Steps, so that workers whose clocks differ a little mostly rank alike; and nodes that started
    together, as those of a new fleet do, begin with all they have.
    """
    if oldest_age_ms - age_ms < SLOW_START_MS:
        return float(max(bytes_capacity, 1))
    steps = min(max(age_ms, 0) * SLOW_START_STEPS // SLOW_START_MS + 1, SLOW_START_STEPS)
    return max(bytes_capacity, 1) * steps / SLOW_START_STEPS


def leading_runs(answers: Iterable[Sequence[Run[Holder]]], *, num_names: int) -> list[Run[Holder]]:
    """From several holders' answers, the fewest runs that cover the longest leading part.

    Greedy: at each point the run that reaches furthest. Runs may overlap between answers.
    """
    runs = [run for answer in answers for run in answer if run.count > 0]
    chosen: list[Run[Holder]] = []
    at = 0
    while at < num_names:
        covering = [run for run in runs if run.first <= at < run.end]
        if not covering:
            break
        best = max(covering, key=lambda run: run.end)
        end = min(best.end, num_names)
        chosen.append(Run(best.holder, at, end - at))
        at = end
    return chosen
