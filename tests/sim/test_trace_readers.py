"""Readers of request traces: three formats by their first line, and a clear word on a bad line."""

import os
from pathlib import Path

import pytest
from kvasir_sim.readers import load_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,1300,109
2023-11-16 18:15:51.2225670,30000,55
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,GPT-4,1087,230,1317,API log
45.5,ChatGPT,0,0,0,API log
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def load(path: Path, **limits: int):
    return load_trace(path, **{"max_input": 20_480, "count": 100, **limits})


def test_azure_rows_become_requests_that_share_nothing(tmp_path: Path) -> None:
    first, second = load(write(tmp_path / "t.csv", AZURE))
    assert (first.input_tokens, first.output_tokens) == (374, 44)
    assert second.arrival_ms - first.arrival_ms == pytest.approx(4_314.579, abs=0.01)
    assert [len(first.names), len(second.names)] == [1, 3]
    assert len({*first.names, *second.names}) == 4


def test_burstgpt_rows_become_requests_in_milliseconds(tmp_path: Path) -> None:
    requests = load(write(tmp_path / "t.csv", BURSTGPT))
    assert [(r.arrival_ms, r.input_tokens, r.output_tokens) for r in requests] == [
        (5_000.0, 472, 18),
        (45_000.0, 1_087, 230),
    ]


def test_mooncake_rows_keep_who_and_how_urgent(tmp_path: Path) -> None:
    rows = [
        '{"timestamp": 9, "input_length": 600, "output_length": 2, "hash_ids": [7, 8],'
        ' "session": "s1", "tenant": "t", "priority": 3, "ttft_slo_ms": 900}',
        '{"timestamp": 5, "input_length": 512, "output_length": 1, "hash_ids": [7]}',
    ]
    plain, rich = load(write(tmp_path / "t", "\n".join(rows)))
    assert (plain.arrival_ms, plain.session, plain.ttft_slo_ms) == (5.0, "", 0)
    assert (rich.session, rich.tenant, rich.priority, rich.ttft_slo_ms) == ("s1", "t", 3, 900)
    assert plain.names == rich.names[:1]


def test_the_first_fitting_requests_are_taken(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", AZURE)
    assert [r.input_tokens for r in load(path, count=1)] == [374]
    assert [r.input_tokens for r in load(path, max_input=400)] == [374]
    with pytest.raises(ValueError, match="no request of up to 10 tokens"):
        load(path, max_input=10)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a,b\n1,2\n", "t:1: neither"),
        ("", "t:1: neither"),
        (AZURE + "yesterday,1,2\n", "t:5: not a request of Azure"),
        (AZURE + "2023-11-16 18:15:46,many,2\n", "t:5: not a request of Azure"),
        (AZURE + "2023-11-16 18:15:46\n", "t:5: not a request of Azure"),
        (BURSTGPT + "soon,GPT-4,1,1,2,API log\n", "t:5: not a request of BurstGPT"),
        ('{"timestamp": 0}', "t:1: not a request of a Mooncake"),
        ('{"timestamp": 1e999, "input_length": 1e999}', "t:1: not a request of a Mooncake"),
    ],
    ids=["unknown", "empty", "time", "number", "short", "burst", "fields", "infinite"],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        load(write(tmp_path / "t", text))


@pytest.mark.trace
@pytest.mark.parametrize(
    ("name", "rows", "mean_input"),
    [("mooncake_conversation.jsonl", 10_091, 6_781), ("azure_llm_2023_conv.csv", 19_366, 1_155)],
)
def test_published_traces_are_read_whole(name: str, rows: int, mean_input: int) -> None:
    folder = os.environ.get("KVASIR_TRACES")
    if not folder:
        pytest.skip("KVASIR_TRACES is not set")
    requests = load_trace(Path(folder) / name, max_input=20_480, count=10**6)
    assert len(requests) == rows
    assert sum(r.input_tokens for r in requests) / rows == pytest.approx(mean_input, rel=0.02)
