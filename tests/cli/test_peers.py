"""Peers of `kvasir bench engine`: what is said where one cannot be measured."""

from pathlib import Path

import pytest
from kvasir_cli.errors import CommandError
from kvasir_cli.load.peers import KV_FORMATS, PROGRAMS, WEIGHT_FORMATS, running_peers
from kvasir_engine.bench import EngineBenchSettings
from kvasir_engine.formats import WeightFormat


def refusal(name: str, weights: WeightFormat = "bf16") -> str:
    settings = EngineBenchSettings(Path("model"), weights=weights)
    with pytest.raises(CommandError) as caught, running_peers([name], settings):
        pass
    return str(caught.value)


@pytest.mark.parametrize("name", KV_FORMATS)
def test_says_how_to_set_a_peer_up(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = f"KVASIR_PEER_{name.upper().replace('.', '_').replace('-', '_')}"
    monkeypatch.setenv(variable, str(tmp_path))
    said = refusal(name)
    assert f"{tmp_path}/bin/python does not exist" in said
    assert variable in said
    assert "bench/README.md" in said
    assert name in Path("bench/README.md").read_text()


def test_names_the_formats_that_a_peer_lacks() -> None:
    assert refusal("vllm-cpu", "int4") == (
        "vllm-cpu is measured with bf16 or int8 weights, not int4"
    )


def test_needs_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"{PROGRAMS}/openvino.py does not exist" in refusal("openvino")


def test_knows_the_formats_of_every_peer() -> None:
    assert KV_FORMATS.keys() == WEIGHT_FORMATS.keys()
