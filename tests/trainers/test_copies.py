"""What is made of a model that was trained in the same process computes with its own weights."""

import copy
import pickle

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import SFTConfig, SFTTrainer

from cbd_trl.architectures import describe
from cbd_trl.architectures.backbone import take_off_patches
from cbd_trl.bridge import reduce_vocabulary, transplant_vocabulary
from cbd_trl.generation import DecodingConfig, generate_completions
from cbd_trl.surgery.statistics import collect_statistics
from tests.surgery.helpers import logits
from tests.tiny import randomize, tiny_model
from tests.tokenizer import tiny_tokenizer
from tests.trainers.bridge_runs import make_bridge, students_tokenizer, teachers_tokenizer, texts
from tests.training import make_trainer, text_rows


def _rows() -> Dataset:
    return Dataset.from_dict({"text": texts()})


def _supervised(model: PreTrainedModel, folder: str, bf16: bool = False) -> PreTrainedModel:
    own = {"max_steps": 1, "use_cpu": True, "bf16": bf16, "report_to": "none", "disable_tqdm": True}
    args = SFTConfig(folder, save_strategy="no", max_length=32, gradient_checkpointing=False, **own)
    SFTTrainer(model, args, train_dataset=_rows(), processing_class=students_tokenizer()).train()
    return model


def _trained(how: str, folder: str) -> PreTrainedModel:
    if how == "bridge":
        trainer = make_bridge(gradient_checkpointing=False)
    else:
        student = tiny_model("llama", seed=1, num_hidden_layers=2, vocab_size=300)
        if how.startswith("sft"):
            student = _supervised(student, folder, bf16=how == "sft in bf16, then distilled")
        teacher = {"teacher": tiny_model("llama", seed=2, vocab_size=300)}
        teacher = {"self_distillation": True} if how == "adapter" else teacher
        data = {"train_dataset": _rows(), "processing_class": students_tokenizer()}
        adapter = {"peft_config": LoraConfig(r=2, target_modules="all-linear")} if how == "adapter" else {}
        hybrid = {"swap_probability": 1.0, "hidden_weight": 1.0} if how == "with hybrids" else {}
        # Its hooks are nothing that Python can pickle.
        precision = {"bf16": how == "in bf16", "gradient_checkpointing": False}
        trainer = make_trainer(student=student, **precision, **data, **teacher, **adapter, **hybrid)
    trainer.train()
    return trainer.model.merge_and_unload() if how == "adapter" else trainer.model


def _reloaded(model: PreTrainedModel, folder) -> torch.Tensor:
    model.save_pretrained(folder)
    return logits(AutoModelForCausalLM.from_pretrained(folder))


HOW = [
    "distilled",
    "with hybrids",
    "adapter",
    "bridge",
    "sft, then distilled",
    "sft in bf16, then distilled",
    "in bf16",
]


@pytest.mark.parametrize("how", HOW)
def test_a_model_that_was_trained_here_is_copied_with_its_weights(how, tmp_path):
    model = _trained(how, str(tmp_path / "out")).eval()
    copied = copy.deepcopy(model)
    randomize(copied, seed=7)
    # Stock accelerate leaves its mixed precision on what it trained.
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "in bf16"):
        assert torch.equal(logits(copied), _reloaded(copied, tmp_path / "copied"))
        assert torch.equal(logits(model), _reloaded(model, tmp_path / "model"))
    assert torch.equal(logits(pickle.loads(pickle.dumps(copied))), _reloaded(copied, tmp_path / "copied"))
    made = transplant_vocabulary(model, students_tokenizer(), teachers_tokenizer())
    for one in (made, reduce_vocabulary(model, students_tokenizer(), texts(20), 290).model):
        randomize(one, seed=8)
        assert logits(one).shape[-1] == one.get_input_embeddings().num_embeddings
        assert torch.equal(logits(one), _reloaded(one, tmp_path / "made"))


def test_a_copy_with_its_adapter_computes_with_both(tmp_path):
    adapter = {"self_distillation": True, "peft_config": LoraConfig(r=2, target_modules="all-linear")}
    trainer = make_trainer(student=tiny_model("llama", seed=1, num_hidden_layers=2), **adapter)
    trainer.train()
    # W x + B A x and (W + B A) x are the same number: in float32 their rounding alone is of the size of the bound.
    copied = copy.deepcopy(trainer.model).double().eval()
    randomize(copied, seed=7)
    expected = _reloaded(copy.deepcopy(copied).merge_and_unload(), tmp_path)
    torch.testing.assert_close(logits(copied), expected, rtol=0, atol=float(1e-5 * expected.std()))


def test_a_copy_that_nobody_here_made_is_measured_and_written_with_as_it_is(tmp_path):
    """TRL's forward on a deep copy computes with the weights of the first, which a stock call cannot tell."""
    first = _supervised(tiny_model("llama", seed=1, num_hidden_layers=2, vocab_size=300), str(tmp_path / "out"))
    copied = copy.deepcopy(first)
    randomize(copied, seed=7)
    fresh = tiny_model("llama", seed=7, num_hidden_layers=2, vocab_size=300)
    batches = [{"input_ids": torch.arange(4, 68).view(2, 32)}]
    found, wanted = (collect_statistics(one, describe(fresh.config), batches) for one in (copied, fresh))
    assert all(torch.equal(found.means[name], mean) for name, mean in wanted.means.items())
    rows = Dataset.from_dict({"prompt": texts(3)})
    options = {"processing_class": students_tokenizer(), "decoding": DecodingConfig(do_sample=False, max_new_tokens=8)}
    written = [
        generate_completions(one, rows, tmp_path / name, disable_tqdm=True, **options).file.read_text()
        for name, one in (("copied.jsonl", copied), ("fresh.jsonl", fresh))
    ]
    assert written[0] == written[1]
    assert not torch.equal(logits(copied), logits(fresh)), "the copy is as stock TRL left it"


def test_a_trainer_of_trl_goes_on_with_a_model_that_taught_in_between(tmp_path):
    args = SFTConfig(
        str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no", max_length=32
    )
    losses = []
    for taught in (False, True):
        model = tiny_model("llama", seed=2)
        trainer = SFTTrainer(model, args, train_dataset=text_rows(), processing_class=tiny_tokenizer())
        if taught:
            make_trainer(teacher=model).train()
            model.requires_grad_(True)
        trainer.train()
        losses.append(trainer.state.log_history[-1]["train_loss"])
    assert losses[0] == losses[1]


def test_a_second_trainer_trains_what_it_was_given_as_it_was_asked_to():
    """In float32 what was trained in bfloat16, and with the weights that a copy has."""
    first = tiny_model("llama", seed=1, num_hidden_layers=2)
    make_trainer(student=first, bf16=True).train()
    weights = {key: tensor.clone() for key, tensor in first.state_dict().items()}
    copied = copy.deepcopy(first)
    randomize(copied, seed=7)
    fresh = tiny_model("llama", seed=7, num_hidden_layers=2)
    logged = []
    for student in (copied, fresh):
        trainer = make_trainer(student=student, max_steps=2, teacher=tiny_model("llama", seed=2))
        trainer.train()
        logged.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert logged[0] == logged[1] and len(logged[0]) == 2
    assert all(torch.equal(copied.state_dict()[key], tensor) for key, tensor in fresh.state_dict().items())
    assert all(torch.equal(weights[key], tensor) for key, tensor in first.state_dict().items())


def test_a_teacher_is_a_model_like_any_other_afterwards(tmp_path):
    teacher = tiny_model("llama", seed=2)
    make_trainer(teacher=teacher).train()
    copied = copy.deepcopy(teacher)
    randomize(copied, seed=7)
    assert torch.equal(logits(copied), _reloaded(copied, tmp_path))


def test_a_forward_that_somebody_else_put_there_stays():
    """Only what trainers put around it is taken off, however often they did."""
    model = tiny_model("llama", seed=1, num_hidden_layers=2)
    before, calls = logits(model), []

    def own(*args, **kwargs):
        calls.append(kwargs)
        return type(model).forward(model, *args, **kwargs)

    model.forward = own
    for _ in range(2):
        make_trainer(student=model)
    take_off_patches(model)
    calls.clear()
    assert torch.equal(logits(model), before) and len(calls) == 1
    del model.forward
    assert torch.equal(logits(model), before)
