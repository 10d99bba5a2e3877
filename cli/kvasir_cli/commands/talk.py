"""kvasir chat and generate: a person at a terminal talks with a running fleet."""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from kvasir_cli.endpoint import DEFAULT_URL, Answer, Endpoint
from kvasir_cli.errors import CommandError, RefusedError

HELP = "/exit leaves, /reset forgets the conversation, Ctrl-C stops an answer."
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def endpoint_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that both commands share."""
    for option in reversed(
        (
            click.option(
                "--url",
                envvar="KVASIR_URL",
                help=f"Of the fleet.  [default: the running one, else {DEFAULT_URL}]",
            ),
            click.option(
                "--api-key", envvar="KVASIR_API_KEY", default="", help="If it asks for one."
            ),
            click.option("--model", help="[default: the one it serves]"),
            click.option("--max-tokens", type=click.IntRange(min=1)),
            click.option("--temperature", type=float, help="0 is greedy."),
            click.option("--top-p", type=float),
            click.option("--top-k", type=int),
            click.option("--seed", type=int),
            click.option("--stop", multiple=True, help="Ends the answer; repeatable."),
        )
    ):
        command = option(command)
    return command


@click.command()
@endpoint_options
@click.option("--system", help="The system message.")
def chat(url: str | None, api_key: str, system: str | None, **sampling: Any) -> None:
    """Chat with a running fleet in the terminal.

    /exit leaves, /reset forgets the conversation, Ctrl-C stops an answer.
    """
    import_readline()
    url = url or default_url()
    body = request_body(sampling)
    body.setdefault("model", asyncio.run(with_endpoint(url, api_key, Endpoint.model)))
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        click.secho(f"{body['model']} at {url}. {HELP}", dim=True)
    while (text := _read_line(is_terminal)) is not None:
        if text in ("/exit", "/quit"):
            break
        if text == "/reset":
            messages = list(start)
        elif text.startswith("/"):
            click.secho(HELP, dim=True)
        elif text:
            messages.append({"role": "user", "content": text})
            answer = _take_turn(url, api_key, {**body, "messages": messages})
            if answer is None:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": answer.text})


@click.command()
@endpoint_options
@click.option("--prompt", help="The text to continue; `-` reads it from stdin.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="A file with the prompt.")
@click.option("--chat", "as_chat", is_flag=True, help="Send it as a chat message.")
@click.option("--stream/--no-stream", default=True, show_default=True)
@click.option("--stats", "shows_stats", is_flag=True, help="Show times and tokens on stderr.")
def generate(
    *,
    url: str | None,
    api_key: str,
    prompt: str | None,
    prompt_file: Path | None,
    as_chat: bool,
    stream: bool,
    shows_stats: bool,
    **sampling: Any,
) -> None:
    """Complete one prompt.

    \b
    kvasir generate --prompt "The capital of France is" --max-tokens 8 --temperature 0
    """
    if (prompt is None) == (prompt_file is None):
        raise click.UsageError("give one of --prompt and --prompt-file")
    text = prompt_file.read_text() if prompt_file else prompt or ""
    text = sys.stdin.read() if text == "-" else text
    body = request_body(sampling)
    body |= {"messages": [{"role": "user", "content": text}]} if as_chat else {"prompt": text}

    async def run(endpoint: Endpoint) -> Answer:
        body.setdefault("model", await endpoint.model())
        answer = Answer()
        path = CHAT if as_chat else COMPLETIONS
        if stream:
            async for piece in endpoint.stream(path, body, answer):
                show(piece)
        else:
            show(await endpoint.whole(path, body, answer))
        return answer

    answer = asyncio.run(with_endpoint(url or default_url(), api_key, run))
    click.echo()
    if shows_stats:
        click.echo(summary(answer), err=True)


async def with_endpoint(url: str, api_key: str, use: Callable[[Endpoint], Any]) -> Any:
    """Call `use` with an endpoint whose connections are closed afterwards."""
    import aiohttp

    async with aiohttp.ClientSession() as session:
        return await use(Endpoint(session, url, api_key=api_key))


def default_url() -> str:
    """The running fleet if there is exactly one, else the default.

    Raises:
        RefusedError: several run, none of them at the default.
    """
    from kvasir_cli.fleet.state import running_fleets

    urls = [fleet.url for fleet in running_fleets()]
    if len(urls) > 1 and DEFAULT_URL not in urls:
        raise RefusedError(f"several fleets are running ({', '.join(urls)}): choose one with --url")
    return urls[0] if len(urls) == 1 else DEFAULT_URL


def request_body(sampling: dict[str, Any]) -> dict[str, Any]:
    """The fields of a request that were given."""
    sampling["stop"] = list(sampling["stop"]) or None
    return {name: value for name, value in sampling.items() if value is not None}


def show(piece: str) -> None:
    """Print text as it is, but for control characters, which could steer the terminal."""
    click.echo("".join(c for c in piece if c.isprintable() or c in "\n\t"), nl=False)
    sys.stdout.flush()


def summary(answer: Answer) -> str:
    """One line on what an answer took."""
    reused = f", {answer.num_cached} reused" if answer.num_cached else ""
    return (
        f"{answer.usage.get('prompt_tokens', 0)} prompt tokens{reused}; "
        f"{answer.num_tokens} tokens; TTFT {answer.ttft_ms:.0f} ms, TPOT {answer.tpot_ms:.1f} ms"
    )


def import_readline() -> None:
    """Line editing and recall in the prompt, where Python has it."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return


def _read_line(is_terminal: bool) -> str | None:
    try:
        return input("> " if is_terminal else "").strip()
    except EOFError:
        if is_terminal:
            click.echo()
        return None


def _take_turn(url: str, api_key: str, body: dict[str, Any]) -> Answer | None:
    """Show one answer; what was shown when it is stopped counts as the answer."""
    answer = Answer()

    async def run(endpoint: Endpoint) -> None:
        async for piece in endpoint.stream(CHAT, body, answer):
            show(piece)

    try:
        asyncio.run(with_endpoint(url, api_key, run))
    except KeyboardInterrupt:
        click.secho(" [stopped]", dim=True)
        return answer
    except CommandError as error:
        click.secho(f"error: {error}", fg="red", err=True)
        return None
    click.echo()
    if sys.stdout.isatty():
        click.secho(summary(answer), dim=True)
    return answer
