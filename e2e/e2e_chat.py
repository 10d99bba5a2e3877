"""Chat requests over the OpenAI HTTP API, streamed; as a script, clients that ask all the time."""

import http.client
import itertools
import json
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from e2e_shell import CommandError, say

Message = dict[str, str]

QUESTION = "What is the capital of France?"
TTFT_SLO_MS = 60_000  # a busy machine may be slow, but must not refuse what would come too late


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


def chat(url: str, *messages: Message, limit_s: float = 120, **params: Any) -> Answer:
    """One streamed chat request; fails unless it ends properly."""
    body = {
        "model": "smollm2",
        "messages": messages or [user(QUESTION)],
        "temperature": 0,
        "max_tokens": 24,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ttft_slo_ms": TTFT_SLO_MS,
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
    except http.client.HTTPException as error:
        raise CommandError(f"{error!r}, after {answer.text!r}") from error
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


@dataclass(frozen=True)
class Load:
    """What clients ask again and again; `system` may hold {name}, which no two requests share."""

    url: str
    num_clients: int
    system: str
    limit_s: float
    params: dict[str, Any]


def run_load(load: Load) -> None:
    """Ask until standard input ends; a line per request: done, or what went wrong."""
    stop, lock = threading.Event(), threading.Lock()

    def report(text: str) -> None:
        with lock:
            print(text.replace("\n", " "), flush=True)

    def ask(client: int) -> None:
        for count in itertools.count():
            if stop.is_set():
                return
            name = f"{client}-{count}"
            prompt = [system(load.system.format(name=name))] if load.system else []
            asked = user(QUESTION if load.system else f"Tell me story {name}.")
            try:
                chat(load.url, *prompt, asked, limit_s=load.limit_s, **load.params)
                report("done")
            except (CommandError, OSError) as error:
                report(f"{time.strftime('%H:%M:%S')} {type(error).__name__} {error}")
                stop.wait(0.2)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(load.num_clients)]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join()
    print("ended", flush=True)


if __name__ == "__main__":
    run_load(Load(**json.loads(sys.argv[1])))
