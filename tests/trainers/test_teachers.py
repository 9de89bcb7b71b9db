"""The teachers of a `DistillTrainer`: one, several, the student's own base, offloaded, and heads with transforms."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from cbd_trl import DistillTrainer
from cbd_trl.cache import write_cache
from cbd_trl.teachers.local import LocalTeacher
from tests.tiny import randomize, tiny_model
from tests.tokenizer import tiny_tokenizer
from tests.trainers.dense import dense_terms, gradients
from tests.training import assert_same_gradient, make_config, make_trainer, one_step, text_rows

TOKENS = [tiny_tokenizer()(row["text"] + "</s>")["input_ids"] for row in text_rows()]
_SHAPE: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
# Models whose logits are more than a matrix times the last hidden state.
HEADS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "soft-capping": (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 8, "final_logit_softcapping": 1.5}),
    "divided": (GraniteConfig, GraniteForCausalLM, {"logits_scaling": 3.0}),
    "multiplied": (CohereConfig, CohereForCausalLM, {"logit_scale": 0.3}),
    "bias": (PhiConfig, PhiForCausalLM, {}),
}


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changes})


def student() -> Any:
    return tiny_model("llama", seed=1, num_hidden_layers=2)


def history(trainer: DistillTrainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def model_with_head(kind: str, layers: int, seed: int) -> Any:
    config_class, model_class, own = HEADS[kind]
    model = model_class._from_config(
        config_class(**_SHAPE, num_hidden_layers=layers, **own), attn_implementation="eager"
    )
    randomize(model, seed)
    return model.eval()


@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.5]])
def test_an_ensemble_is_the_mean_of_the_distributions(weights: list[float] | None) -> None:
    teachers = [tiny_model("llama", seed=seed) for seed in (2, 3, 4)]
    by_hand = student()
    terms = dense_terms(by_hand, teachers, TOKENS, weights=weights)
    (terms["kd"] + 0.5 * terms["ce"]).backward()
    logs, grads = one_step(make_trainer(student=student(), teacher=teachers, teacher_weights=weights))
    for name, value in terms.items():
        assert logs[name] == pytest.approx(value.item(), rel=1e-5), name
    assert_same_gradient(grads, gradients(by_hand))


def test_teacher_weights_change_the_gradient_and_only_their_ratio_counts() -> None:
    def run(weights: list[float] | None) -> dict:
        teachers = [tiny_model("llama", seed=seed) for seed in (2, 3)]
        return one_step(make_trainer(teacher=teachers, teacher_weights=weights))[1]

    equal, ratio, scaled = run(None), run([1.0, 3.0]), run([2.0, 6.0])
    assert_same_gradient(scaled, ratio)
    with pytest.raises(AssertionError):
        assert_same_gradient(ratio, equal, rtol=1e-3)


@pytest.mark.parametrize("weights", [None, [7.0]])
def test_one_teacher_in_a_list_is_the_teacher(weights: list[float] | None) -> None:
    listed = make_trainer(teacher=[tiny_model("llama", seed=2)], teacher_weights=weights, hidden_weight=1.0)
    assert_same_gradient(one_step(listed)[1], one_step(make_trainer(hidden_weight=1.0))[1])


def test_each_teacher_of_an_ensemble_may_have_padding_of_its_own() -> None:
    exact = [tiny_model("llama", seed=seed) for seed in (2, 3)]
    padded = tiny_model("llama", seed=3, vocab_size=72)
    own = exact[1].state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        own[name] = torch.cat([own[name], torch.randn(8, 32)])
    padded.load_state_dict(own)
    narrow_logs, narrow = one_step(make_trainer(teacher=exact))
    logs, grads = one_step(make_trainer(teacher=[tiny_model("llama", seed=2), padded]))
    assert_same_gradient(grads, narrow)
    assert logs["kd"] == pytest.approx(narrow_logs["kd"], rel=1e-5)


@pytest.mark.parametrize("field", [{"hidden_weight": 1.0}, {"swap_probability": 1.0}], ids=str)
def test_the_layers_of_several_teachers_are_the_first_ones(field) -> None:
    """With the first one's weight near 1 the distribution is its own, too."""
    first, second = (tiny_model("llama", seed=seed) for seed in (2, 3))
    alone, expected = one_step(make_trainer(teacher=first, **field))
    logs, grads = one_step(make_trainer(teacher=[first, second], teacher_weights=[1.0, 1e-9], **field))
    assert_same_gradient(grads, expected, rtol=1e-4)
    term = "hidden" if "hidden_weight" in field else "hybrid"
    assert logs[term] == pytest.approx(alone[term], rel=1e-4)
    other, _ = one_step(make_trainer(teacher=[second, first], teacher_weights=[1e-9, 1.0], **field))
    assert abs(other[term] - alone[term]) > 0.01 * alone[term]


def test_ensembles_that_cannot_work_are_refused() -> None:
    two = [tiny_model("llama", seed=seed) for seed in (2, 3)]
    with pytest.raises(ValueError, match="teacher_weights has 3 entries for 2 teachers: give one for each"):
        make_trainer(teacher=two, teacher_weights=[1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"teacher_weights has 2 entries for 1 teacher: .* passed as a list"):
        make_trainer(teacher_weights=[1.0, 1.0])
    with pytest.raises(ValueError, match="A teacher is needed"):
        make_trainer(teacher=[])
    with pytest.raises(TypeError, match=r"teacher_model is a int: .* \(or a list of them\)"):
        make_trainer(teacher=[3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="shares parameters with the student"):
        ours = student()
        make_trainer(student=ours, teacher=[two[0], ours])


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_the_own_base_stays_what_it_was_while_the_student_moves(modules_to_save: list[str] | None) -> None:
    adapter = lora(modules_to_save=modules_to_save)
    trainer = make_trainer(
        student=student(), self_distillation=True, peft_config=adapter, max_steps=4, hidden_weight=1.0
    )
    before = dense_terms(student(), [student()], TOKENS)
    trainer.train()
    entries = history(trainer)
    assert entries[0]["kd"] == entries[0]["hidden"] == 0.0
    assert entries[-1]["kd"] > 1e-4 and entries[-1]["ce"] < entries[0]["ce"]
    for entry in entries:
        assert entry["teacher_ce"] == pytest.approx(before["teacher_ce"].item(), rel=1e-5)
    assert trainer.model.get_model_status().enabled is True
    assert all(
        p.requires_grad == ("lora_" in n or "modules_to_save" in n) for n, p in trainer.model.named_parameters()
    )
    after = dense_terms(trainer.model, [student()], TOKENS)
    assert after["kd"].item() > entries[-1]["kd"] / 10


def test_the_gradient_towards_the_own_base_is_that_towards_a_copy_of_it() -> None:
    def run(**teacher: Any) -> dict:
        torch.manual_seed(0)  # the adapter's start
        return one_step(make_trainer(student=student(), peft_config=lora(), max_steps=3, **teacher))[1]

    assert_same_gradient(run(self_distillation=True), run(teacher=student()), rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_for_the_student_and_not_for_its_own_base(checkpointing: bool) -> None:
    base = tiny_model("gpt2", seed=1, n_layer=2, attn_pdrop=0.1, resid_pdrop=0.1)
    expected = dense_terms(copy.deepcopy(base), [copy.deepcopy(base)], TOKENS)["teacher_ce"].item()
    adapter = lora(target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.1)
    trainer = make_trainer(
        "gpt2",
        student=base,
        self_distillation=True,
        peft_config=adapter,
        max_steps=3,
        gradient_checkpointing=checkpointing,
    )
    trainer.train()
    assert trainer.model.training
    for entry in history(trainer):
        assert entry["teacher_ce"] == pytest.approx(expected, rel=1e-5)
        assert entry["kd"] > 1e-4


def test_own_bases_that_would_not_stay_are_refused() -> None:
    def refused(message: str, **arguments: Any) -> None:
        with pytest.raises(ValueError, match=message):
            make_trainer(student=student(), self_distillation=True, **arguments)

    refused(r"the student has no adapter\. Pass a `peft_config`")
    refused("bias='all' trains the base's biases: the teacher would not be the model", peft_config=lora(bias="all"))
    taking = lora(init_lora_weights="olora")
    refused("init_lora_weights='olora' takes a part out of the base's weights", peft_config=taking)
    both = {"teacher": tiny_model("llama", seed=2), "peft_config": lora()}
    refused("given as `teacher_model` of the trainer, and self_distillation in the DistillConfig", **both)
    with pytest.raises(ValueError, match=r"teacher_processing_class .* with self_distillation they are one"):
        DistillTrainer(
            student(),
            args=make_config(self_distillation=True),
            train_dataset=text_rows(),
            processing_class=tiny_tokenizer(),
            teacher_processing_class=tiny_tokenizer(),
            peft_config=lora(),
        )


def test_caches_that_would_mislead_are_refused(tmp_path: Path) -> None:
    rows = {"train_dataset": text_rows(), "processing_class": tiny_tokenizer()}
    how = {"args": make_config(), "processing_class": tiny_tokenizer(), "k": 4}
    write_cache(tiny_model("llama", seed=2), text_rows(), tmp_path, **how)
    late = {"kd_weight": 0.0, "kd_schedule": "linear", "kd_weight_end": 1.0}
    with pytest.raises(ValueError, match=r"temperature=2\.0, but the cache .* Set temperature=1\.0"):
        make_trainer(teacher_cache=str(tmp_path), temperature=2.0, **late)
    with pytest.raises(ValueError, match=r"temperature=2\.0, but the cache .* Set temperature=1\.0"):
        make_trainer(teacher_cache=str(tmp_path), temperature=2.0, kd_weight=0.0)
    with pytest.raises(
        ValueError, match=r"block_map pairs .* a teacher_cache or what a teacher wrote has none to pair"
    ):
        make_trainer(teacher_cache=str(tmp_path), block_map=[[0, 1], [2, 3]])
    with pytest.raises(ValueError, match=r"teacher_processing_class .* a teacher_cache knows its own"):
        DistillTrainer(
            student(), args=make_config(teacher_cache=str(tmp_path)), **rows, teacher_processing_class=tiny_tokenizer()
        )


@pytest.mark.parametrize("ensemble", [False, True])
def test_an_offloaded_teacher_says_the_same(ensemble: bool) -> None:
    def run(offload: bool) -> tuple:
        teachers = [tiny_model("llama", seed=seed) for seed in (2, 3)]
        how = {"teacher": teachers} if ensemble else {"teacher": teachers[0], "hidden_weight": 1.0}
        trainer = make_trainer(**how, teacher_offload=offload, max_steps=2, eval_dataset=text_rows())
        used = teachers if ensemble else teachers[:1]
        assert all(p.is_meta is offload for teacher in used for p in teacher.parameters())
        return *one_step(trainer), trainer.evaluate()

    (plain_logs, plain, plain_metrics), (logs, grads, metrics) = run(False), run(True)
    assert_same_gradient(grads, plain)
    for name in ("loss", "kd", "teacher_ce"):
        assert logs[name] == pytest.approx(plain_logs[name], rel=1e-6)
        assert metrics[f"eval_{name}"] == pytest.approx(plain_metrics[f"eval_{name}"], rel=1e-6)


def test_hybrids_take_layers_of_an_offloaded_teacher() -> None:
    runs = [one_step(make_trainer(swap_probability=1.0, teacher_offload=offload)) for offload in (False, True)]
    assert_same_gradient(runs[1][1], runs[0][1])


def offloaded(model: Any, folder: Path) -> Any:
    """The model with half of its layers, its last norm and its head on the disk, as a `device_map` offloads them."""
    rest = {f"model.layers.{i}": "cpu" if i < 2 else "disk" for i in range(4)}
    first = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu"}
    return dispatch_model(model, {**first, **rest, "model.norm": "disk", "lm_head": "disk"}, offload_dir=folder)


def test_a_teacher_offloaded_by_its_device_map_says_the_same(tmp_path: Path) -> None:
    runs = []
    for folder in (None, tmp_path):
        teacher: Any = tiny_model("llama", seed=2)
        teacher = teacher if folder is None else offloaded(teacher, folder)
        trainer = make_trainer(teacher=teacher, hidden_weight=1.0, swap_probability=1.0, eval_dataset=text_rows())
        runs.append((one_step(trainer), trainer.evaluate()["eval_loss"]))
    assert_same_gradient(runs[1][0][1], runs[0][0][1])
    assert runs[1][1] == pytest.approx(runs[0][1], rel=1e-6)
    assert teacher.lm_head.weight.is_meta and teacher.hf_device_map["lm_head"] == "disk"


def test_a_device_map_for_what_cannot_have_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its device_map puts it on cpu, disk: there can be one of the two"):
        make_trainer(teacher=offloaded(tiny_model("llama", seed=2), tmp_path), teacher_offload=True)
    teacher = LocalTeacher(offloaded(tiny_model("llama", seed=2), tmp_path))
    with pytest.raises(ValueError, match="over cpu, disk, and 2 processes are trained in"):
        teacher.place(SimpleNamespace(num_processes=2))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", HEADS)
def test_what_a_model_does_to_its_logits_is_done(kind: str) -> None:
    by_hand, teacher = model_with_head(kind, layers=2, seed=1), model_with_head(kind, layers=3, seed=2)
    terms = dense_terms(by_hand, [teacher], TOKENS)
    (terms["kd"] + 0.5 * terms["ce"]).backward()
    trained = model_with_head(kind, layers=2, seed=1)
    trainer = make_trainer(student=trained, teacher=teacher, eval_dataset=text_rows(), loss_chunk_size=7)
    metrics = trainer.evaluate()
    _, grads = one_step(trainer)
    for name, value in terms.items():
        assert history(trainer)[0][name] == pytest.approx(value.item(), rel=1e-5), name
        assert metrics[f"eval_{name}"] == pytest.approx(value.item(), rel=1e-5), name
    assert_same_gradient(grads, gradients(by_hand))


@pytest.mark.parametrize("kind", HEADS)
def test_the_transform_of_the_head_matters(kind: str) -> None:
    model = model_with_head(kind, layers=2, seed=1)
    before = model(input_ids=torch.tensor(TOKENS[:1])).logits
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(model.config, name, None) is not None:
            setattr(model.config, name, 1.0 if name != "final_logit_softcapping" else None)
            setattr(model, name, 1.0)
    if model.lm_head.bias is not None:
        model.lm_head.bias.data.zero_()
    assert (model(input_ids=torch.tensor(TOKENS[:1])).logits - before).abs().max() > 0.1


class _Shifted(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * 2 + 1
        return outputs


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_whose_logits_are_not_its_head_is_refused(role: str) -> None:
    odd = _Shifted(tiny_model("llama").config)
    odd.load_state_dict(tiny_model("llama", seed=5).state_dict())
    with pytest.raises(
        ValueError, match=r"logits of _Shifted are not its output embedding.* Distill a model with a pl"
    ):
        make_trainer(**{role: odd})


def test_a_teacher_with_an_adapter_is_the_merged_one() -> None:
    torch.manual_seed(0)
    adapted = get_peft_model(tiny_model("llama", seed=2), lora(lora_dropout=0.5))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    merged = copy.deepcopy(adapted).merge_and_unload()
    logs, grads = one_step(make_trainer(teacher=adapted, hidden_weight=1.0))
    expected, theirs = one_step(make_trainer(teacher=merged, hidden_weight=1.0))
    plain, _ = one_step(make_trainer(hidden_weight=1.0))
    assert_same_gradient(grads, theirs, rtol=1e-4)
    assert logs["kd"] == pytest.approx(expected["kd"], rel=1e-4)
    assert abs(logs["kd"] - plain["kd"]) > 0.01 * plain["kd"]
    assert not any(parameter.requires_grad for parameter in adapted.parameters())


def test_a_teacher_with_virtual_tokens_is_refused() -> None:
    how = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match=r"The teacher has a PromptTuningConfig, .* Give a teacher without it"):
        make_trainer(teacher=get_peft_model(tiny_model("llama", seed=2), how))


def test_a_block_map_that_is_wrong_or_useless_is_refused() -> None:
    make_trainer(block_map=[[0, 1], [2, 3]])
    with pytest.raises(ValueError, match="The block map must split the upper model's 4 layers"):
        make_trainer(block_map=[[0, 1], [3]])
    make_trainer(student=student(), self_distillation=True, peft_config=lora(), block_map=[[0], [1]])
