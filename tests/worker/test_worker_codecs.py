"""A fleet whose KV may travel encoded: as the model's probe allows, and apart from exact KV."""

from pathlib import Path

import pytest
from kvasir_engine.codec_probe import RECORD_NAME, Probe, ProbeRow, write_record
from kvasir_engine.model import load_model
from kvasir_proto.errors import KvasirError
from worker_builders import make_model_dir, make_request, prompt, started, until

CODECS = ("int8", "int4", "entropy")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stands int8 and entropy."""
    folder = make_model_dir(tmp_path_factory.mktemp("models") / "wide", golden="qwen3-qknorm")
    loaded = load_model(folder, num_threads=1)
    if loaded.layout.dtype != "bfloat16":
        pytest.skip("this CPU keeps KV as float32")
    rows = (ProbeRow(codec, 10.0, 0.5 * (codec == "int4"), 0.02, 2.0) for codec in CODECS)
    write_record(Probe(loaded.fingerprint, 512, 10.0, tuple(rows)), folder / RECORD_NAME)
    return folder


@pytest.mark.parametrize("codec", ["int8", "entropy"])
async def test_a_hand_off_travels_encoded(model: Path, codec: str) -> None:
    async with (
        started(model, "p", role="prefill", kv_codec=codec) as prefill,
        started(model, "d", role="decode", kv_codec=codec) as decode,
    ):
        request = make_request(prompt(200))
        request.prefill_peer.CopyFrom(prefill.address)
        result = await decode.generate(request)
        assert (result.error, len(result.tokens)) == (None, 8)
        await until(lambda: prefill.is_idle and decode.is_idle)
        metric = f'kvasir_worker_handoff_wire_bytes_total{{codec="{codec}"'
        sent = await decode.metric(metric)
        assert 0 < sent < 0.6 * result.stats.kv_bytes_moved


async def test_auto_begins_raw_on_a_link_that_it_does_not_know(model: Path) -> None:
    async with (
        started(model, "p", role="prefill", kv_codec="auto") as prefill,
        started(model, "d", role="decode", kv_codec="auto") as decode,
    ):
        request = make_request(prompt(100))
        request.prefill_peer.CopyFrom(prefill.address)
        assert (await decode.generate(request)).error is None
        metric = 'kvasir_worker_handoff_wire_bytes_total{codec="raw"'
        assert await decode.metric(metric) > 0


async def test_exact_and_lossy_blocks_share_neither_names_nor_connections(model: Path) -> None:
    request = make_request(prompt(100))
    async with (
        started(model, "p") as exact,
        started(model, "d", role="decode", kv_codec="int8") as lossy,
    ):
        assert exact.host.served().fingerprint != lossy.host.served().fingerprint
        expected = (await exact.generate(make_request(prompt(100)))).tokens
        request.prefill_peer.CopyFrom(exact.address)
        assert (await lossy.generate(request)).tokens == expected
        refused = 'kvasir_worker_kv_transfers_total{error="other_layout"'
        assert await lossy.metric(refused) == 1


async def test_a_codec_that_has_not_passed_is_refused_before_weights_are_packed(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("kvasir_engine.model._pack")
    with pytest.raises(KvasirError, match="kvasir kv probe") as caught:
        async with started(model, "w", kv_codec="int4"):
            pass
    assert caught.value.param == "--kv-codec"
