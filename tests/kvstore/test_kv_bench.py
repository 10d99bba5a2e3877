"""The benchmark of the data plane, at a size that takes no time."""

import json
from pathlib import Path

import pytest
from kvasir_kvstore import bench_peers
from kvasir_kvstore.bench import run_bench_kv


def test_every_path_is_measured_and_written(tmp_path: Path) -> None:
    lines: list[str] = []
    target = tmp_path / "kv.json"
    rows = run_bench_kv(target, sizes_bytes=[65536], bytes_per_row=1, report=lines.append)
    written = json.loads(target.read_text())
    assert {"memcpy", "raw-tcp", "grpc", "shm", "tcp", "tcp-encrypted"} <= {
        row["path"] for row in written
    }
    assert len(rows) == len(written)
    for path in ("memcpy", "nixl", "mooncake"):  # measured, or said to be absent
        assert any(line.startswith(path) for line in lines), path
    for row in written:
        assert row["size_bytes"] == 65536
        assert row["gb_per_s"] > 0
        assert row["p50_us"] > 0
        assert row["cpu_s_per_gb"] >= 0


def test_a_peer_that_was_asked_for_and_is_not_there_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_peers, "_NIXL", "kvasir_has_no_such_module")
    with pytest.raises(ValueError, match="nixl"):
        run_bench_kv(peers=["nixl"], report=lambda _line: None)
