"""Every way to give a model by name: a checkpoint without one of its weights is refused, before any work."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast
from trl import SFTTrainer

from cbd_trl import build_chain, chain_from_anchors
from cbd_trl.cache import write_cache
from cbd_trl.generation import generate_completions
from cbd_trl.recipe.check import _check_weights
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer
from tests.trainers.bridge_runs import make_bridge
from tests.training import make_config, make_trainer, text_rows


def saved(folder: Path, tokenizer: PreTrainedTokenizerFast, **fields: Any) -> str:
    tiny_model("llama", **fields).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


DOORS: dict[str, Any] = {
    "source": lambda bad, good, out: chain(bad, out),
    "anchor, first": lambda bad, good, out: chain_from_anchors([bad, good], dataset=text_rows(), output_dir=out),
    "anchor, last": lambda bad, good, out: chain_from_anchors([good, bad], dataset=text_rows(), output_dir=out),
    "student": lambda bad, good, out: make_trainer(student=bad, processing_class=None),
    "teacher": lambda bad, good, out: make_trainer(teacher=bad),
    "one of two teachers": lambda bad, good, out: make_trainer(teacher=[good, bad]),
    "student of a bridge": lambda bad, good, out: make_bridge(model=bad, processing_class=None),
    "teacher of a bridge": lambda bad, good, out: make_bridge(teacher_model=bad, teacher_processing_class=None),
    "cache": lambda bad, good, out: write_cache(bad, text_rows(), out, args=make_config(), k=4),
    "completions": lambda bad, good, out: generate_completions(bad, [{"prompt": "w1"}], out, use_cpu=True),
    "recipe": lambda bad, good, out: _check_weights(bad),
}


def chain(source: Any, out: Path, **options: Any) -> Any:
    arguments = {"dataset": text_rows(), "output_dir": out, "args": make_config(), "calibration_tokens": 64, **options}
    return build_chain(source, [{"num_hidden_layers": 1}], **arguments)


@pytest.mark.parametrize("door", DOORS)
def test_a_weight_that_is_not_there_closes_the_door(tmp_path, door, monkeypatch) -> None:
    bad = saved(tmp_path / "bad", tiny_tokenizer())
    # Of the same kind, and smaller or larger than the other.
    good = saved(tmp_path / "good", tiny_tokenizer(), num_hidden_layers=6 if door == "anchor, last" else 2)
    state = load_file(f"{bad}/model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, f"{bad}/model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(SFTTrainer, "_prepare_dataset", lambda *_, **__: pytest.fail("the data were prepared"))
    with pytest.raises(ValueError, match=r"'bad' is not a whole LlamaForCausalLM: .*layers\.1\.mlp\.up_proj\.weight"):
        DOORS[door](bad, good, tmp_path / "out")
    assert not list(tmp_path.glob("out/**/*.safetensors"))


@pytest.mark.parametrize("in_memory", [True, False])
def test_an_adapter_as_source_says_merge(tmp_path, in_memory) -> None:
    peft = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    peft.save_pretrained(tmp_path / "adapter")
    place = peft if in_memory else str(tmp_path / "adapter")
    for door in (
        lambda: chain(place, tmp_path / "out", processing_class=tiny_tokenizer()),
        lambda: chain_from_anchors([place, place], dataset=text_rows(), output_dir=tmp_path / "out"),
        lambda: generate_completions(place, [{"prompt": "w1"}], tmp_path / "out", processing_class=tiny_tokenizer()),
    ):
        with pytest.raises(ValueError, match=r"PEFT adapter.*merge_and_unload\(\)"):
            door()
    if not in_memory:
        with pytest.raises(ValueError, match=r"The student 'adapter' is a PEFT adapter.*merge_and_unload\(\)"):
            make_trainer(student=place)


@pytest.mark.parametrize("door", [door for door in DOORS if "bridge" not in door and door != "recipe"])
def test_a_model_without_a_head_closes_the_door(tmp_path, door) -> None:
    body, good = tiny_model("llama").model, tiny_model("llama", num_hidden_layers=6 if door == "anchor, last" else 2)
    with pytest.raises(ValueError, match="is a LlamaModel, which has no head over the vocabulary"):
        DOORS[door](body, good, tmp_path / "out")


def test_a_student_by_name_is_loaded_as_sfttrainer_loads_it(tmp_path) -> None:
    place = saved(tmp_path / "model", tiny_tokenizer())
    tiny_model("llama").to(torch.bfloat16).save_pretrained(place)
    options = {"attn_implementation": "eager"}
    for kwargs, dtype in ((None, torch.float32), (options | {"dtype": "bfloat16"}, torch.bfloat16)):
        ours = make_trainer(student=place, processing_class=None, model_init_kwargs=kwargs)
        theirs = SFTTrainer(place, ours.args, train_dataset=text_rows())
        assert ours.model.dtype == theirs.model.dtype == dtype
        assert ours.model.config._attn_implementation == theirs.model.config._attn_implementation
        assert ours.args.model_init_kwargs == kwargs
        assert ours.processing_class.get_vocab() == theirs.processing_class.get_vocab()
        assert ours.model.name_or_path == theirs.model.name_or_path == place
