"""Chat requests over the OpenAI HTTP API, streamed."""

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from e2e_shell import CommandError, say

Message = dict[str, str]

QUESTION = "What is the capital of France?"


@dataclass
class Answer:
    """What came back, and who served it."""

    text: str = ""
    num_chunks: int = 0
    finish_reason: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)
    ttft_s: float = 0.0


def user(text: str) -> Message:
    """What the user says."""
    return {"role": "user", "content": text}


def system(text: str) -> Message:
    """What the model is told in advance; long enough to be handed from worker to worker."""
    return {"role": "system", "content": text}


def chat(url: str, *messages: Message, limit_s: float = 60, **params: Any) -> Answer:
    """One streamed chat request; fails unless it ends properly."""
    body = {
        "model": "smollm2",
        "messages": messages or [user(QUESTION)],
        "temperature": 0,
        "max_tokens": 24,
        "stream": True,
        "stream_options": {"include_usage": True},
        **params,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    answer, started_s = Answer(), time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=limit_s) as response:
            for line in response:
                _read_event(line.decode().strip(), answer, started_s)
    except urllib.error.HTTPError as error:
        raise CommandError(f"status {error.code}: {error.read().decode()}") from error
    if not answer.finish_reason:
        raise CommandError(f"the stream ended early, after {answer.text!r}")
    return answer


def _read_event(line: str, answer: Answer, started_s: float) -> None:
    if not line.startswith("data: ") or line == "data: [DONE]":
        return
    event = json.loads(line.removeprefix("data: "))
    if "error" in event:
        raise CommandError(f"error in mid-stream: {event['error']}")
    for choice in event.get("choices", ()):
        text = choice.get("delta", {}).get("content") or ""
        if text and not answer.text:
            answer.ttft_s = time.monotonic() - started_s
        answer.text += text
        answer.num_chunks += bool(text)
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
    answer.usage = event.get("usage") or answer.usage
    answer.stats = event.get("kvasir") or answer.stats


def tell(answer: Answer) -> None:
    """Print what came back."""
    stats = answer.stats
    say(f"answer in {answer.num_chunks} chunks, first after {answer.ttft_s:.2f} s: {answer.text!r}")
    say(
        f"prefill by {stats.get('prefill_worker')}, decode by {stats.get('decode_worker')}, "
        f"{stats.get('kv_bytes_moved')} KV bytes moved, "
        f"prompt of {answer.usage.get('prompt_tokens')} tokens: "
        f"{stats.get('tokens_cached_decode')} held by the decode worker, "
        f"{stats.get('tokens_cached_local')} by the prefill worker, "
        f"{stats.get('tokens_cached_fetched')} fetched, {stats.get('tokens_computed')} computed"
    )


class Load:
    """Clients that each ask one thing after another, until stopped; counts failures."""

    def __init__(
        self,
        url: str,
        *,
        num_clients: int,
        ask: Callable[[str], Sequence[Message]] = lambda name: [user(f"Tell me story {name}.")],
        limit_s: float = 60,
        **params: Any,
    ) -> None:
        self._url = url
        self._ask = ask
        self._limit_s = limit_s
        self._params = params
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(name,), daemon=True)
            for name in "abcdefgh"[:num_clients]
        ]
        self.num_done = 0
        self.failures: list[str] = []

    def _run(self, name: str) -> None:
        while not self._stop.is_set():
            messages = self._ask(f"{name}{self.num_done}")
            try:
                chat(self._url, *messages, limit_s=self._limit_s, **self._params)
                with self._lock:
                    self.num_done += 1
            except (CommandError, OSError) as error:
                self.failures.append(str(error))
                self._stop.wait(0.2)

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(self._limit_s + 10)
        say(f"load: {self.num_done} requests done, {len(self.failures)} failed")
