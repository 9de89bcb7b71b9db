from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM, EvalPrediction, MixtralConfig, MixtralForCausalLM
from trl import SFTConfig

from cbd_trl import DistillConfig, DistillTrainer
from cbd_trl.losses.divergence_table import OPTIONS
from cbd_trl.trainers.hidden_states import resolve_block_map
from cbd_trl.utils.formatting import readable_name
from tests.tiny import by_kind, tiny_model
from tests.tokenizer import WORDS, tiny_tokenizer
from tests.training import assert_same_gradient, make_config, make_trainer, one_step, text_rows

CHAT = [{"role": "user", "content": "w1 w2 w3"}, {"role": "assistant", "content": "w4 w5"}]
FORMATS = {
    "text": {"text": ["w1 w2 w3 w4", "w5 w6"]},
    "tokens": {"input_ids": [[7, 8, 9, 2], [10, 11, 2]]},
    "messages": {"messages": [CHAT, CHAT]},
    "prompt-completion": {"prompt": ["w1 w2 ", "w3 "], "completion": ["w4 w5", "w6"]},
    "conversational prompt-completion": {"prompt": [CHAT[:1]] * 2, "completion": [CHAT[1:]] * 2},
}


@pytest.mark.parametrize("family", by_kind())
def test_a_student_learns_its_teacher(family: str) -> None:
    trainer = make_trainer(family, max_steps=12, hidden_weight=1.0, swap_probability=0.5, learning_rate=2e-2)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {"kd", "ce", "hidden", "teacher_ce", "num_tokens"} <= history[0].keys()
    assert history[-1]["kd"] < 0.8 * history[0]["kd"]
    assert history[-1]["teacher_ce"] == pytest.approx(history[0]["teacher_ce"], rel=1e-5)


def test_a_copy_of_the_teacher_has_no_distance_and_no_gradient() -> None:
    teacher = tiny_model("llama", seed=2)
    trainer = make_trainer(student=tiny_model("llama", seed=2), teacher=teacher, ce_weight=0.0, hidden_weight=1.0)
    logs, grads = one_step(trainer)
    assert logs["kd"] == 0.0 and logs["hidden"] == 0.0 and logs["ce"] == logs["teacher_ce"]
    assert max(gradient.abs().max() for gradient in grads.values()) < 1e-6


def test_without_distillation_it_is_sft() -> None:
    trainer = make_trainer(kd_weight=0.0, ce_weight=1.0)
    reference = tiny_model("llama", seed=1, num_hidden_layers=2)
    rows = [trainer.processing_class(row["text"] + "</s>", return_tensors="pt")["input_ids"] for row in text_rows()]
    count = sum(ids.shape[1] - 1 for ids in rows)
    loss = sum(reference(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1) for ids in rows) / count
    loss.backward()
    logs, grads = one_step(trainer)
    assert logs["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradient(grads, {n: p.grad for n, p in reference.named_parameters()})


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_trains(name: str) -> None:
    logs, _ = one_step(make_trainer(train_dataset=Dataset.from_dict(FORMATS[name]), per_device_train_batch_size=2))
    assert logs["kd"] > 0 and logs["num_tokens"] > 0


def test_only_the_completion_is_scored() -> None:
    rows = Dataset.from_dict(FORMATS["prompt-completion"])
    completion, _ = one_step(make_trainer(train_dataset=rows))
    everything, _ = one_step(make_trainer(train_dataset=rows, completion_only_loss=False))
    teacher, tokenizer = tiny_model("llama", seed=2), tiny_tokenizer()
    losses = []
    for prompt, answer in zip(rows["prompt"], rows["completion"], strict=True):
        ids = tokenizer(prompt + answer + "</s>", return_tensors="pt")["input_ids"]
        scored = ids.shape[1] - len(tokenizer(prompt)["input_ids"])
        logs = teacher(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        losses += (-logs[-scored:, 0]).tolist()
    assert completion["teacher_ce"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert everything["teacher_ce"] != pytest.approx(completion["teacher_ce"], rel=1e-3)


def test_metrics_see_the_logits_of_the_student() -> None:
    shapes = []

    def accuracy(prediction: EvalPrediction) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {"rows": len(prediction.label_ids)}

    trainer = make_trainer(eval_dataset=text_rows(), per_device_eval_batch_size=3, compute_metrics=accuracy)
    metrics = trainer.evaluate()
    assert shapes == [(4, 13, 64)] and metrics["eval_rows"] == 4
    assert metrics["eval_loss"] == pytest.approx(make_trainer(eval_dataset=text_rows()).evaluate()["eval_loss"])


def test_padded_vocabularies_work_on_the_shared_rows() -> None:
    teacher = tiny_model("llama", seed=2)
    wide = tiny_model("llama", seed=2, vocab_size=72)
    rest = {name: tensor for name, tensor in teacher.state_dict().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rest[name] = torch.cat([rest[name], torch.randn(8, 32)])
    wide.load_state_dict(rest)
    narrow_logs, narrow = one_step(make_trainer(teacher=teacher))
    wide_logs, padded = one_step(make_trainer(teacher=wide))
    assert_same_gradient(padded, narrow)
    assert wide_logs["kd"] == pytest.approx(narrow_logs["kd"], rel=1e-5)


def test_a_teacher_by_path_is_loaded_and_its_tokenizer_compared(tmp_path: Path) -> None:
    tiny_model("llama", seed=2).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    by_path = DistillTrainer(
        tiny_model("llama", seed=1, num_hidden_layers=2),
        args=make_config(teacher_model_name_or_path=str(tmp_path), teacher_model_init_kwargs={"dtype": "float32"}),
        train_dataset=text_rows(),
        processing_class=tiny_tokenizer(),
    )
    assert_same_gradient(one_step(by_path)[1], one_step(make_trainer())[1])
    tiny_tokenizer(WORDS[::-1]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Use BridgeDistillTrainer to distill across tokenizers"):
        make_trainer(teacher=str(tmp_path))


def test_lora_trains_the_adapter_alone(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian", task_type="CAUSAL_LM")
    trainer = make_trainer(
        peft_config=config, hidden_weight=1.0, swap_probability=0.5, max_steps=2, output_dir=str(tmp_path)
    )
    logs, grads = one_step(trainer)
    assert logs["kd"] > 0 and grads and all("lora_" in name for name in grads)
    assert all("lora_" in n for n, p in trainer.model.named_parameters() if p.requires_grad)
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_checkpoints_hold_the_student_alone_and_resume_exactly(tmp_path: Path) -> None:
    how = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "hidden_weight": 1.0, "swap_probability": 0.5}
    how |= {"per_device_train_batch_size": 2, "train_dataset": text_rows((3, 9, 5, 12, 2, 7, 4, 6))}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **how)
    whole.train()
    resumed = make_trainer(output_dir=str(tmp_path / "resumed"), **how)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert resumed.state.log_history[-2]["num_tokens"] == whole.state.log_history[-2]["num_tokens"]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    assert saved.config.num_hidden_layers == 2
    assert {n: t.shape for n, t in saved.state_dict().items()} == {
        n: t.shape for n, t in whole.model.state_dict().items()
    }
    card = (tmp_path / "whole" / "checkpoint-4").parent.joinpath("README.md").read_text()
    assert "fine-tuned version of" not in card and "of None" not in card and str(tmp_path) not in card
    assert "0.5 x cross-entropy" in card and "35,104 parameters" in card and "50% of the steps" in card


def test_nothing_is_left_on_the_models() -> None:
    student, teacher = tiny_model("llama", seed=1, num_hidden_layers=2), tiny_model("llama", seed=2)
    one_step(make_trainer(student=student, teacher=teacher, hidden_weight=1.0, swap_probability=1.0))
    layers = [*student.model.layers, *teacher.model.layers]
    assert len(student.model.layers) == 2
    assert not any(module._forward_hooks for layer in layers for module in layer.modules())


def test_hidden_states_of_unequal_width_need_a_block_map() -> None:
    student = tiny_model(
        "llama", seed=1, num_hidden_layers=2, hidden_size=24, num_attention_heads=3, num_key_value_heads=3
    )
    with pytest.raises(ValueError, match=r"24 channels and the teacher 32: .*Pass the pair's block_map"):
        make_trainer(student=student, hidden_weight=1.0)
    logs, _ = one_step(make_trainer(student=student, hidden_weight=1.0, block_map=[[0, 1], [2, 3]]))
    assert 0 < logs["hidden"] < 2


def test_block_maps() -> None:
    assert resolve_block_map(None, 2, 2) == [[0], [1]]
    assert [layer for block in resolve_block_map(None, 3, 7) for layer in block] == list(range(7))
    assert resolve_block_map([[0, 1], [2]], 2, 3) == [[0, 1], [2]]
    with pytest.raises(ValueError, match="The student has 3 layers and the teacher 2"):
        resolve_block_map(None, 3, 2)
    with pytest.raises(ValueError, match="block map"):
        resolve_block_map([[0], [2]], 2, 3)


def test_a_block_map_changes_the_hidden_term() -> None:
    even, _ = one_step(make_trainer(hidden_weight=1.0))
    own, _ = one_step(make_trainer(hidden_weight=1.0, block_map=[[0, 1], [2, 3]]))
    assert own["hidden"] != even["hidden"] and own["kd"] == even["kd"]


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="neither was `teacher_model`"):
        DistillTrainer(tiny_model("llama"), args=make_config(), train_dataset=text_rows())
    with pytest.raises(ValueError, match="both were given"):
        make_trainer(teacher_model_name_or_path="somewhere")
    plain = SFTConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(TypeError, match="args is a SFTConfig: DistillTrainer needs a DistillConfig"):
        DistillTrainer(tiny_model("llama"), tiny_model("llama"), plain, text_rows())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="compute_loss_func would replace"):
        DistillTrainer(tiny_model("llama"), tiny_model("llama"), make_config(), compute_loss_func=print)
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="virtual tokens in front of the student's inputs"):
        make_trainer(peft_config=prompt)
    experts = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"Set router_aux_loss_coef=0\.0"):
        make_trainer(student=MixtralForCausalLM(experts))


def test_names_on_cards_are_never_local_paths(tmp_path: Path) -> None:
    assert readable_name("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"
    assert readable_name(str(tmp_path / "anchor")) == "anchor"
    assert readable_name("None") is None and readable_name("") is None


def test_defaults_are_documented_in_docstring_and_help() -> None:
    own = set(DistillConfig.__dataclass_fields__) - set(SFTConfig.__dataclass_fields__)
    assert own
    for name in own:
        # The options of divergences are documented by their rows.
        assert name in OPTIONS or f"{name}:" in (DistillConfig.__doc__ or ""), name
        assert DistillConfig.__dataclass_fields__[name].metadata["help"]


def _first_tokens_masked(inputs: dict[str, Any]) -> dict[str, Any]:
    labels = inputs["labels"].clone()
    labels[:, :6] = -100
    return {**inputs, "labels": labels}


def _first_tokens_masked_in_place(inputs: dict[str, Any]) -> dict[str, Any]:
    inputs["labels"][:, :6] = -100
    return inputs


@pytest.mark.parametrize(
    ("change", "matters"),
    [
        pytest.param(_first_tokens_masked, True, id="other-labels"),
        pytest.param(_first_tokens_masked_in_place, True, id="in-place"),
        pytest.param(lambda inputs: {name: tensor[:2] for name, tensor in inputs.items()}, True, id="fewer-rows"),
        pytest.param(
            lambda inputs: {name: tensor.flip(0) for name, tensor in inputs.items()}, False, id="other-order"
        ),
    ],
)
def test_a_subclass_may_change_the_batch(change: Any, matters: bool) -> None:
    """What is scored follows the labels that the loss gets."""
    trainer = make_trainer(per_device_train_batch_size=4)
    collated = next(iter(trainer.get_train_dataloader()))
    prepared = trainer._prepare_inputs(dict(collated))
    plain = {name: tensor.clone() for name, tensor in prepared.items()}
    unchanged = trainer.compute_loss(trainer.model, prepared).item()
    loss = trainer.compute_loss(trainer.model, change(prepared)).item()
    assert loss == pytest.approx(trainer.compute_loss(trainer.model, change(plain)).item(), rel=1e-6)
    assert (abs(loss - unchanged) > 1e-4) == matters
