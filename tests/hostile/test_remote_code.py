"""Code and pickles of a repository: never run unless asked for, and named then."""

import ast
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

import cbd_trl
from cbd_trl.chain.source import Source
from cbd_trl.teachers.local import load_teacher
from cbd_trl.utils.model_folders import name_remote_code
from cbd_trl.utils.tokenizers import find_tokenizer
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer

_CODE = """
from pathlib import Path
(Path({folder!r}) / "ran").touch()
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = "evil"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer:
    pass
"""


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A model whose repository brings code along, which leaves a file "ran" when it is run."""
    folder = tmp_path / "evil"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "modeling_evil.py").write_text(_CODE.format(folder=str(tmp_path)))
    for name, classes, kind in (
        ("config.json", {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}, "evil"),
        ("tokenizer_config.json", {"AutoTokenizer": ["modeling_evil.Tokenizer", None]}, None),
    ):
        found = json.loads((folder / name).read_text())
        found |= {"auto_map": classes, **({"model_type": kind} if kind else {"tokenizer_class": "EvilTokenizer"})}
        (folder / name).write_text(json.dumps(found))
    # Where nothing is said of it, transformers asks at the keyboard.
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked whether to run it"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder


@pytest.fixture
def said(caplog, monkeypatch):
    """What the package logs."""
    monkeypatch.setattr(logging.getLogger("cbd_trl.utils.untrusted"), "propagate", True)
    transformers_logging.enable_propagation()
    yield caplog
    transformers_logging.disable_propagation()


@pytest.mark.parametrize(
    "load",
    [
        lambda place: load_teacher(place, tiny_model("llama")),
        lambda place: Source(place).config(),
        lambda place: Source(place).model(),
        lambda place: Source(place).model({"trust_remote_code": True}),
    ],
    ids=["teacher", "config", "model", "model-kwargs"],
)
def test_no_code_runs_unless_asked_for(evil, load):
    with pytest.raises((ValueError, OSError), match=r"trust_remote_code|custom code|evil"):
        load(str(evil))
    assert not (evil.parent / "ran").exists()


def test_a_tokenizer_runs_none_either(evil):
    find_tokenizer(str(evil), None, local_only=True)
    assert not (evil.parent / "ran").exists()


def test_what_is_asked_for_is_named(evil, said):
    name_remote_code(str(evil), "v2")
    message = said.records[-1].getMessage()
    assert "modeling_evil.Config, modeling_evil.Model of " in message and "at v2" in message
    assert not (evil.parent / "ran").exists()


def test_a_teacher_names_what_it_is_about_to_run(evil, said, monkeypatch):
    seen = {}

    def load(place, **options):
        seen.update(options, said=[record.getMessage() for record in said.records])
        return tiny_model("llama", seed=1)

    monkeypatch.setattr("cbd_trl.teachers.local.load_causal_lm", load)
    load_teacher(str(evil), tiny_model("llama"), trust_remote_code=True)
    assert seen["trust_remote_code"] is True and "modeling_evil.Model" in seen["said"][-1]
    said.clear()
    load_teacher(str(evil), tiny_model("llama"), init_kwargs={"trust_remote_code": True})
    assert "modeling_evil.Model" in seen["said"][-1]
    said.clear()
    load_teacher(str(evil), tiny_model("llama"))
    assert seen["trust_remote_code"] is False and not seen["said"]


def test_a_model_without_code_names_none(tmp_path, said):
    tiny_model("llama").save_pretrained(tmp_path)
    name_remote_code(str(tmp_path))
    name_remote_code(str(tmp_path / "nothing"))
    assert not said.records


@pytest.mark.parametrize(
    "load",
    [
        lambda place: load_teacher(place, tiny_model("llama")),
        lambda place: load_teacher(place, tiny_model("llama"), init_kwargs={"use_safetensors": False}),
        lambda place: Source(place).model(),
        lambda place: Source(place).model({"use_safetensors": False}),
    ],
    ids=["teacher", "teacher-kwargs", "source", "source-kwargs"],
)
def test_no_pickle_is_read(tmp_path, load, monkeypatch):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    shutil.move(tmp_path / "model" / "model.safetensors", tmp_path / "away")
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    with pytest.raises((ValueError, OSError), match=r"model\.safetensors"):
        load(str(tmp_path / "model"))


def calls(tree):
    """Calls of `from_pretrained` of a class of transformers that may run code."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="from_pretrained")) if name[:4] == "Auto":
                yield node


def test_every_loader_says_whether_it_runs_code():
    seen = 0
    for file in Path(cbd_trl.__file__).parent.rglob("*.py"):
        for call in calls(ast.parse(file.read_text(encoding="utf-8"))):
            seen += 1
            # Options that are handed on (`**`) are those of the tests above.
            said = {keyword.arg for keyword in call.keywords}
            assert said & {"trust_remote_code", None}, (
                f"{file.name}, line {call.lineno}: trust_remote_code is not said"
            )
    assert seen >= 10
