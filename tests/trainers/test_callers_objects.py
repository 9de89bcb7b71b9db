"""What a caller hands in is the caller's: afterwards configs, arguments, rows and tokenizers are as they were.

A student and its tokenizer are a trainer's to change, as in TRL: it saves them.
"""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig

from cbd_trl import BridgeDistillTrainer, DistillTrainer, build_chain, chain_from_anchors, from_chain
from cbd_trl.bridge import reduce_vocabulary, transplant_vocabulary
from cbd_trl.cache import write_cache
from cbd_trl.generation import DecodingConfig, generate_completions
from tests.build.bridged import ANCHORS, anchor_zero, bridge_step, source
from tests.chain.helpers import chain_config, chain_rows
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer
from tests.trainers import bridge_runs
from tests.training import make_config, text_rows

_TRAINING = {"max_steps": 1, "eos_token": "w9"}


def _bare() -> Any:
    """A tokenizer that a trainer gives a padding token, and another end of a text."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    return tokenizer


def _distil(folder: Path) -> tuple[Any, ...]:
    args, rows, teacher = make_config(**_TRAINING), text_rows(), tiny_model("llama", seed=2)
    student = tiny_model("llama", seed=1, num_hidden_layers=2)
    return (args, rows, teacher), lambda: DistillTrainer(
        student, teacher, args, train_dataset=rows, processing_class=_bare()
    ).train()


def _bridge(folder: Path) -> tuple[Any, ...]:
    """With hidden states that the arguments say nothing of: they are decided for these two models."""
    args = bridge_runs.make_bridge_config(hidden_weight=None, objective="alm", eos_token="a")
    rows, teacher = Dataset.from_dict({"text": bridge_runs.texts()}), bridge_runs.teacher()
    theirs = copy.deepcopy(bridge_runs.teachers_tokenizer())
    return (args, rows, teacher, theirs), lambda: BridgeDistillTrainer(
        bridge_runs.student(), teacher, args, train_dataset=rows, teacher_processing_class=theirs,
        processing_class=copy.deepcopy(bridge_runs.students_tokenizer()),
    ).train()  # fmt: skip


def _build(folder: Path) -> tuple[Any, ...]:
    model, args, tokenizer, rows = tiny_model("llama"), chain_config(**_TRAINING), _bare(), chain_rows()
    anchors = [{"num_hidden_layers": 3, "args": chain_config(**_TRAINING)}]
    return (model, args, tokenizer, rows, anchors[0]["args"]), lambda: build_chain(
        model, anchors, dataset=rows, output_dir=folder, args=args, processing_class=tokenizer, calibration_tokens=64
    )


def _build_bridged(folder: Path) -> tuple[Any, ...]:
    step, theirs = bridge_step(), copy.deepcopy(bridge_runs.teachers_tokenizer())
    step = copy.copy(step)
    object.__setattr__(step, "model", anchor_zero())
    object.__setattr__(step, "processing_class", copy.deepcopy(bridge_runs.students_tokenizer()))
    step.processing_class.pad_token = None
    model, args = source(), chain_config(max_steps=1)
    return (model, args, theirs, step.model, step.args, step.processing_class, step.dataset), lambda: build_chain(
        model, ANCHORS, dataset=step.dataset, output_dir=folder, args=args, processing_class=theirs, bridge=step,
        calibration_tokens=64,
    )  # fmt: skip


def _from_anchors(folder: Path) -> tuple[Any, ...]:
    models = [tiny_model("llama"), tiny_model("llama", seed=1, intermediate_size=40)]
    rows, tokenizer, fields = chain_rows(), _bare(), {"intermediate_size": 44}

    def make() -> None:
        chain = chain_from_anchors(
            models, dataset=rows, output_dir=folder / "chain", processing_class=tokenizer, calibration_tokens=64
        )
        from_chain(chain, config=fields, calibration_dataset=rows, save_directory=folder / "target")

    return (*models, rows, tokenizer, fields), make


def _cache(folder: Path) -> tuple[Any, ...]:
    own = {"report_to": "none", "use_cpu": True, "bf16": False, "packing": True}
    args, rows, teacher = SFTConfig(str(folder / "out"), eos_token="w9", **own), text_rows(), tiny_model("llama")
    tokenizer = _bare()
    return (args, rows, teacher, tokenizer), lambda: write_cache(
        teacher, rows, folder / "cache", processing_class=tokenizer, args=args, k=4
    )


def _generate(folder: Path) -> tuple[Any, ...]:
    rows, model, tokenizer = Dataset.from_dict({"prompt": ["w1 w2", "w3"]}), tiny_model("llama"), _bare()
    decoding = DecodingConfig(max_new_tokens=4)
    return (rows, model, tokenizer, decoding), lambda: generate_completions(
        model, rows, folder / "out.jsonl", processing_class=tokenizer, decoding=decoding, disable_tqdm=True
    )


def _vocabularies(folder: Path) -> tuple[Any, ...]:
    model = bridge_runs.student()
    old, new = (copy.deepcopy(make()) for make in (bridge_runs.students_tokenizer, bridge_runs.teachers_tokenizer))
    texts = bridge_runs.texts(20)

    def make() -> None:
        transplant_vocabulary(model, old, new)
        reduce_vocabulary(model, old, texts, 290)

    return (model, old, new, texts), make


def _state(one: Any) -> Any:
    """All of an object that a user would see changed."""
    if isinstance(one, Dataset):
        return one.to_list(), one.features
    if hasattr(one, "get_vocab"):
        return one.special_tokens_map, one.chat_template, one.padding_side, one.get_vocab(), copy.copy(one.init_kwargs)
    if isinstance(one, SFTConfig):
        return copy.deepcopy({field.name: getattr(one, field.name) for field in dataclasses.fields(one)})
    if isinstance(one, torch.nn.Module):
        state = {key: tensor.tolist() for key, tensor in one.state_dict().items()}
        return state, one.config.to_dict(), one.generation_config.to_dict(), one.device
    return copy.deepcopy(one if isinstance(one, dict | list) else vars(one))


@pytest.mark.parametrize(
    "what", [_distil, _bridge, _build, _build_bridged, _from_anchors, _cache, _generate, _vocabularies]
)
def test_what_is_handed_in_stays_as_it_was(what, tmp_path):
    objects, call = what(tmp_path)
    before = [_state(one) for one in objects]
    call()
    for one, state in zip(objects, before, strict=True):
        now = _state(one)
        if isinstance(state, dict):
            assert {key: (state.get(key), now[key]) for key in now if state.get(key) != now[key]} == {}
        assert now == state, type(one).__name__
