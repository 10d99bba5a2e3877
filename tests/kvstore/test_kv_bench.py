"""The benchmark of the data plane, at a size that takes no time."""

import json
import sys
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
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KVASIR_PEER_NIXL", str(tmp_path))
    with pytest.raises(ValueError, match="nixl"):
        run_bench_kv(peers=["nixl"], report=lambda _line: None)


def test_a_peer_is_measured_in_its_own_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "transfers.py").symlink_to(Path("bench/peers/transfers.py").absolute())
    (tmp_path / "nixl_read.py").write_text(
        "import contextlib, time, transfers\n"
        "transfers.serve(lambda size: contextlib.nullcontext(lambda: time.sleep(size * 1e-9)))\n"
    )
    monkeypatch.setenv("KVASIR_PEER_NIXL", str(tmp_path))
    monkeypatch.setattr(bench_peers, "PROGRAMS", tmp_path)
    rows = run_bench_kv(
        peers=["nixl"], sizes_bytes=[1 << 20], bytes_per_row=1, report=lambda _line: None
    )
    row = next(row for row in rows if row.path == "nixl")
    assert 0 < row.gb_per_s <= 1
    assert row.p50_us >= 1048
    (tmp_path / "nixl_read.py").write_text("")
    with pytest.raises(ConnectionError, match="nixl failed"):
        run_bench_kv(peers=["nixl"], sizes_bytes=[65536], report=lambda _line: None)
