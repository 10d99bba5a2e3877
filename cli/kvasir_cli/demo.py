"""The demo: a fleet of six processes answers two turns of a chat, and shows who served them.

Decides what the demo asks and what counts as success: the right answer, and KV that really moved
from a prefill worker to a decode worker. The fleet is `kvasir up`'s, the requests are those of any
client of the OpenAI API.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from kvasir_cli.endpoint import Answer, Endpoint
from kvasir_cli.errors import CommandError
from kvasir_cli.fleet.plan import LOOPBACK, FleetOptions
from kvasir_cli.fleet.ports import can_bind, free_ports

SYSTEM = (
    "You are a helpful AI assistant. You run inside Kvasir, which serves language models with "
    "prefill and decode on separate workers. A prefill worker reads the whole prompt and computes "
    "its keys and values; a decode worker takes them over and writes the answer, one token after "
    "the other. Blocks of keys and values have names, so a later turn of the same conversation "
    "finds them again and only the new words are computed. Answer each question in one short "
    "sentence, correctly and politely."
)
QUESTIONS = ("What is the capital of France?", "What is the capital of Italy?")
EXPECTED = ("Paris", "Rome")
MAX_TOKENS = 48
MODEL_NAME = "smollm2"
PORT = 8080
COLUMNS = (
    "turn",
    "prefill",
    "decode",
    "prompt",
    "reused",
    "tokens",
    "TTFT ms",
    "TPOT ms",
    "KV moved",
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and what its answer took."""

    question: str
    answer: Answer

    def stat(self, name: str) -> Any:
        """A field of RequestStats; 0 or empty if the server does not send it."""
        return self.answer.stats.get(name) or 0

    @property
    def is_local(self) -> bool:
        """Whether the decode worker computed the rest of the prompt itself."""
        return self.stat("prefill_worker") in (0, "", self.stat("decode_worker"))

    @property
    def num_reused(self) -> int:
        """Prompt tokens that were not computed again, wherever their KV was."""
        return self.answer.num_cached


def demo_options(model: Path, threads: int) -> FleetOptions:
    """One router, two prefill and two decode workers, one KV node, on a free port."""
    port = PORT
    if not can_bind(LOOPBACK, port):
        port = free_ports(LOOPBACK, 1, avoid=frozenset(), source=random.Random())[0]
    return FleetOptions(
        model=model,
        model_name=MODEL_NAME,
        num_prefill=2,
        num_decode=2,
        num_kv_nodes=1,
        host=LOOPBACK,
        port=port,
        grpc_port=0,
        redis=None,
        num_threads=threads,
        kv_cache_mb=128,
        kv_node_mb=128,
    )


async def converse(endpoint: Endpoint, show: Callable[[str], None]) -> list[Turn]:
    """Ask the questions in one conversation, greedily, showing tokens as they arrive."""
    messages = [{"role": "system", "content": SYSTEM}]
    turns = []
    for question in QUESTIONS:
        click.secho(f"\n> {question}", bold=True)
        messages.append({"role": "user", "content": question})
        body = {"model": MODEL_NAME, "messages": messages, "temperature": 0}
        answer = Answer()
        async for piece in endpoint.stream(
            "/v1/chat/completions", {**body, "max_tokens": MAX_TOKENS}, answer
        ):
            show(piece)
        click.echo()
        messages.append({"role": "assistant", "content": answer.text})
        turns.append(Turn(question, answer))
    return turns


def check(turns: list[Turn]) -> None:
    """Raises CommandError unless the answers are right and the first turn was handed off."""
    for turn, expected in zip(turns, EXPECTED, strict=True):
        if expected not in turn.answer.text:
            raise CommandError(f"{turn.question!r} was answered {turn.answer.text!r}")
    first, second = turns
    if first.is_local or not int(first.stat("kv_bytes_moved")):
        raise CommandError("the first turn was not handed from a prefill to a decode worker")
    if not second.num_reused:
        raise CommandError("the second turn reused no KV of the first")


def print_table(turns: list[Turn]) -> None:
    """Who served each turn, how fast, what moved and what was reused."""
    from rich.console import Console
    from rich.table import Table

    from kvasir_cli.progress import size_text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in COLUMNS[:3] else "right")
    for number, turn in enumerate(turns, 1):
        answer = turn.answer
        table.add_row(
            str(number),
            "itself" if turn.is_local else turn.stat("prefill_worker"),
            turn.stat("decode_worker") or "?",
            str(answer.usage.get("prompt_tokens", "?")),
            str(turn.num_reused),
            str(answer.num_tokens),
            f"{answer.ttft_ms:.0f}",
            f"{answer.tpot_ms:.1f}",
            size_text(int(turn.stat("kv_bytes_moved"))),
        )
    Console().print(table)
