"""Base models: what is refused before anything heavy loads, and what the fingerprint notices."""

import json
import shutil
from pathlib import Path

import pytest

from hone.base_model import find_base_model
from hone.errors import BaseModelError
from hone.storage import Home


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "base"))


def test_a_good_folder_is_described(folder: Path, home: Home) -> None:
    base = find_base_model(str(folder), home=home)
    assert (base.is_decoder, base.max_context, len(base.id.fingerprint)) == (True, 256, 64)


def test_any_changed_weight_changes_the_fingerprint(folder: Path, home: Home) -> None:
    before = find_base_model(str(folder), home=home).id.fingerprint
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert find_base_model(str(folder), home=home).id.fingerprint != before


def test_a_folder_that_is_not_there_is_refused(home: Home) -> None:
    with pytest.raises(BaseModelError, match="no such base model folder"):
        find_base_model("./nowhere", home=home)


def test_a_hub_name_out_of_reach_is_refused(home: Home) -> None:
    with pytest.raises(BaseModelError, match="the hub cannot be reached"):
        find_base_model("nobody/no-such-model", home=home)


def test_a_base_without_a_tokenizer_is_refused(folder: Path, home: Home) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BaseModelError, match="neither a tokenizer"):
        find_base_model(str(folder), home=home)


def test_pickled_weights_are_refused(folder: Path, home: Home) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match="only pickled weights"):
        find_base_model(str(folder), home=home)


def test_a_base_that_brings_code_is_refused(folder: Path, home: Home) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "code.Model"}}))
    with pytest.raises(BaseModelError, match="never runs code"):
        find_base_model(str(folder), home=home)
