"""Where a chain of blocks is kept, and who has the longest leading run of it.

Nodes are ranked by rendezvous hashing on the chain's first block (Thaler and Ravishankar, 1998):
every worker ranks them alike without talking, and a node that comes or goes moves only its own
share. Which nodes live is left to the caller.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Holder = TypeVar("Holder")


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


def rank_nodes(chain_head: bytes, nodes: Iterable[str]) -> list[str]:
    """The nodes, best first, for the chain that begins with this block."""

    def weight(node: str) -> bytes:
        key = len(chain_head).to_bytes(2, "big") + chain_head + node.encode()
        return hashlib.blake2b(key, digest_size=8, person=b"kvasir-place").digest()

    return sorted(set(nodes), key=lambda node: (weight(node), node), reverse=True)


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
