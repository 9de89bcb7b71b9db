"""A student learns from a teacher with another tokenizer: the same guarantees as with the same one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers.normalizers import Lowercase
from torch import Tensor
from transformers import AutoModelForCausalLM

from cbd_trl.bridge.bridge import Bridge, StudentRows
from cbd_trl.bridge.objectives.prefix import PrefixTable
from cbd_trl.trainers.bridge_config import HIDDEN_WEIGHT
from tests.bridge.alignment_helpers import normalizing
from tests.bridge.tokenizers_of_kinds import make_tokenizer
from tests.trainers.bridge_runs import (
    make_bridge,
    student,
    students_tokenizer,
    teacher,
    teachers_tokenizer,
    texts,
)
from tests.trainers.runs import Run, lora
from tests.training import assert_same_gradient, one_step

CHAT = [{"role": "user", "content": "ba ké lo"}, {"role": "assistant", "content": "mün ri sta"}]
FORMATS: dict[str, dict[str, list]] = {
    "text": {"text": ["ba ké lo mün", "ri sta"]},
    "tokens": {"input_ids": [[70, 71, 72, 2], [73, 74, 2]]},
    "messages": {"messages": [CHAT, CHAT]},
    "prompt-completion": {"prompt": ["ba ké", "lo"], "completion": [" mün ri", " sta"]},
    "conversational prompt-completion": {"prompt": [CHAT[:1]] * 2, "completion": [CHAT[1:]] * 2},
}
LOGGED = ("loss", "kd", "ce", "teacher_ce", "unaligned")


def _assert_same_run(ours: Run, theirs: Run) -> None:
    assert_same_gradient(ours[1], theirs[1])
    for name in LOGGED:
        assert ours[0][name] == pytest.approx(theirs[0][name], rel=1e-5), name
    assert ours[0]["num_tokens"] == theirs[0]["num_tokens"]


@pytest.mark.parametrize("objective", ["alm", "uld", "shared", "dskd-cma", "prefix"])
def test_a_student_learns_its_teacher(objective: str) -> None:
    trainer = make_bridge(objective=objective, ce_weight=0.0, max_steps=12, learning_rate=1e-2)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "kd" in entry]
    assert {*LOGGED, "num_tokens"} <= history[0].keys()
    assert history[-1]["kd"] < 0.8 * history[0]["kd"]
    assert history[-1]["teacher_ce"] == pytest.approx(history[0]["teacher_ce"], rel=1e-5)


def _surprise(model: Any, tokenizer: Any) -> Tensor:
    """Of every token but the first of each text, one after the other."""
    rows = [tokenizer(text + "</s>", return_tensors="pt")["input_ids"] for text in texts()]
    logs = [model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0] for ids in rows]
    return -torch.cat(logs)


def test_with_one_tokenizer_it_is_the_likelihood_of_every_token() -> None:
    tokenizer = students_tokenizer()
    both = {"processing_class": tokenizer, "teacher_processing_class": tokenizer}
    trainer = make_bridge(teacher_model=teacher(vocab_size=300), temperature=2.0, **both)
    ours, theirs = student(), _surprise(teacher(vocab_size=300), tokenizer).detach()
    mine = _surprise(ours, tokenizer)
    p, q = torch.exp(-theirs.double() / 2), torch.exp(-mine.double() / 2)
    kd = 2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
    loss = (kd + 0.5 * mine).mean()
    loss.backward()
    logs, grads = one_step(trainer)
    expected = {"loss": loss, "kd": kd.mean(), "ce": mine.mean(), "teacher_ce": theirs.mean()}
    assert {name: logs[name] for name in expected} == pytest.approx({n: v.item() for n, v in expected.items()}, 1e-5)
    assert logs["unaligned"] == 0
    assert_same_gradient(grads, {name: p.grad for name, p in ours.named_parameters() if p.grad is not None})


SAME = [
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    {"padding_free": True, "max_length": None},
    {"packing": True},
    {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_length": 40},
    {"loss_chunk_size": 3},
]


@pytest.mark.parametrize("objective", ["alm=1,shared=0.5", "dskd-cma", "prefix"])
@pytest.mark.parametrize("how", SAME, ids=str)
def test_batching_changes_nothing(how: dict[str, Any], objective: str) -> None:
    fields = {"objective": objective, "hidden_weight": 1.0, "hidden_projector": True}
    _assert_same_run(one_step(make_bridge(**fields, **how)), one_step(make_bridge(**fields)))


def test_the_table_of_prefixes_is_put_on_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[torch.device] = []

    def to(self: PrefixTable, device: torch.device) -> PrefixTable:
        there.append(device)
        return self

    monkeypatch.setattr(PrefixTable, "to", to)
    trainer = make_bridge(objective="prefix")
    # And on the host for the collator.
    assert there == [trainer.accelerator.device, torch.device("cpu")]


def test_evaluation_is_a_mean_over_tokens() -> None:
    rows = Dataset.from_dict({"text": texts(5, seed=2)})
    runs = [make_bridge(eval_dataset=rows, per_device_eval_batch_size=size).evaluate() for size in (1, 5)]
    for name in LOGGED:
        assert runs[0][f"eval_{name}"] == pytest.approx(runs[1][f"eval_{name}"], rel=1e-5), name


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_trains(name: str) -> None:
    logs, _ = one_step(make_bridge(train_dataset=Dataset.from_dict(FORMATS[name]), per_device_train_batch_size=2))
    assert logs["kd"] > 0 and logs["unaligned"] < 0.5


def test_only_the_completion_is_scored() -> None:
    rows = Dataset.from_dict(FORMATS["prompt-completion"])
    completion, everything = (
        one_step(make_bridge(train_dataset=rows, completion_only_loss=only))[0] for only in (True, False)
    )
    reference, tokenizer, own = teacher(), teachers_tokenizer(), students_tokenizer()
    nats, scored = 0.0, 0
    for prompt, answer in zip(rows["prompt"], rows["completion"], strict=True):
        prompt_ids, ids = own(prompt)["input_ids"], own(prompt + answer + "</s>", return_tensors="pt")["input_ids"]
        labels = ids.clone()
        labels[0, : len(prompt_ids)] = -100
        read = Bridge(own, tokenizer).read(StudentRows.of(ids, labels))
        logs = reference(input_ids=read.ids_RU).logits[0, :-1].log_softmax(-1)
        each = -logs.gather(1, read.ids_RU[0, 1:, None])[:, 0]
        nats += each[read.alignment.teacher_RU[0, 1:] >= 0].sum().item()
        scored += read.scored
    assert completion["teacher_ce"] == pytest.approx(nats / scored, rel=1e-5)
    assert everything["teacher_ce"] != pytest.approx(completion["teacher_ce"], rel=1e-3)


def test_tokens_without_a_counterpart_are_counted_and_trained_by_cross_entropy_alone() -> None:
    own = make_tokenizer("byte_level", 300)
    own.add_special_tokens({"additional_special_tokens": ["<cut>"]})
    ids = own("ba lo<cut>ri sta</s>")["input_ids"]
    rows = Dataset.from_dict({"input_ids": [ids]})
    how = {"model": student(vocab_size=301), "processing_class": own, "train_dataset": rows}
    logs, _ = one_step(make_bridge(**how))
    read = Bridge(own, teachers_tokenizer()).read(StudentRows.of(*[torch.tensor([ids])] * 2))
    assert 0 < read.unaligned < read.scored
    assert logs["unaligned"] == pytest.approx(read.unaligned / read.scored)
    loss = student(vocab_size=301)(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert logs["ce"] == pytest.approx(loss.item(), rel=1e-5)


def test_empty_rows_and_rows_of_one_token_change_nothing() -> None:
    tokens = [students_tokenizer()(text)["input_ids"] for text in texts()]
    whole = one_step(make_bridge(train_dataset=Dataset.from_dict({"input_ids": tokens})))
    short = Dataset.from_dict({"input_ids": [[5], *tokens, [9], []]})
    logs, grads = one_step(make_bridge(train_dataset=short, per_device_train_batch_size=6))
    assert_same_gradient(grads, whole[1])
    assert logs["num_tokens"] == whole[0]["num_tokens"] + 2


@pytest.mark.parametrize(("objective", "text"), [("alm=1,uld=0.5", "alm + 0.5 uld"), ("dskd-cma", "dskd-cma")])
def test_checkpoints_resume_exactly_and_hold_the_student_alone(tmp_path: Path, objective: str, text: str) -> None:
    how: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "hidden_weight": 1.0}
    how |= {"hidden_projector": True, "per_device_train_batch_size": 2, "objective": objective}
    rows = Dataset.from_dict({"text": texts(8)})
    whole, resumed = (make_bridge(output_dir=str(tmp_path / n), train_dataset=rows, **how) for n in ("whole", "again"))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert resumed.state.log_history[-2]["num_tokens"] == whole.state.log_history[-2]["num_tokens"]
    for one, other in zip(resumed.projectors.parameters(), whole.projectors.parameters(), strict=True):
        assert torch.equal(one, other)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    assert load_file(tmp_path / "whole" / "checkpoint-4" / "model.safetensors").keys() <= saved.state_dict().keys()
    assert {name: t.shape for name, t in saved.state_dict().items()} == {
        name: t.shape for name, t in student().state_dict().items()
    }
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "`cbd_trl.BridgeDistillTrainer`" in card and f"{text} across vocabularies" in card
    assert "by a tokenizer of 420 tokens" in card and "share that the teacher has no tokens for" in card


def test_the_maps_of_an_objective_are_trained_beside_the_student() -> None:
    trainer = make_bridge(objective="dskd-cma", ce_weight=0.0)
    started = {name: p.clone() for name, p in trainer.projectors.named_parameters()}
    _, grads = one_step(trainer)
    assert {name for name in grads if "distill_projectors" in name} == {f"distill_projectors.{n}" for n in started}
    assert len(started) == 3
    assert all(not torch.equal(p, started[name]) for name, p in trainer.projectors.named_parameters())
    assert not hasattr(trainer.model, "distill_projectors")
    own = student()
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"objective='dskd-cma' with optimizers=\(SGD, \.\.\.\)"):
        make_bridge(model=own, objective="dskd-cma", optimizers=(optimizer, None))


def test_lora_trains_the_adapter_alone(tmp_path: Path) -> None:
    logs, grads = one_step(make_bridge(peft_config=lora(), max_steps=2, output_dir=str(tmp_path)))
    assert logs["kd"] > 0 and grads and all("lora_" in name for name in grads)


@pytest.mark.parametrize("pair", [("gpt2", "qwen3"), ("llama", "gemma2")], ids="-".join)
def test_families_of_other_architectures_teach(pair: tuple[str, str]) -> None:
    logs, grads = one_step(make_bridge(model=student(pair[0]), teacher_model=teacher(pair[1])))
    assert logs["kd"] > 0 and all(gradient.isfinite().all() for gradient in grads.values())


def test_a_teacher_that_reads_less_than_a_row_is_given_what_it_can() -> None:
    long = one_step(make_bridge())
    cut = one_step(make_bridge(teacher_model=teacher("gpt2", max_position_embeddings=8, n_positions=8)))
    assert long[0]["unaligned"] == 0 < cut[0]["unaligned"] < 1


def test_data_without_a_common_token_is_refused_before_training() -> None:
    lower = normalizing("byte_level", Lowercase(), 420)
    loud = [students_tokenizer()(text)["input_ids"] for text in ("BALO", "STAVARI")]
    scored = sum(len(ids) - 1 for ids in loud)
    how = {"teacher_processing_class": lower}
    with pytest.raises(ValueError, match=f"Of {scored} scored tokens in 2 rows the teacher has no counterpart"):
        make_bridge(train_dataset=Dataset.from_dict({"input_ids": loud}), **how)
    quiet = students_tokenizer()("BALO balo")["input_ids"]
    logs, _ = one_step(make_bridge(train_dataset=Dataset.from_dict({"input_ids": [*loud, quiet]}), **how))
    assert 0.5 < logs["unaligned"] < 1
    with pytest.raises(ValueError, match=r"No token of the train dataset is scored: .*empty, of one token or masked"):
        make_bridge(train_dataset=Dataset.from_dict({"input_ids": [[6], [7]]}))


def test_it_trains_in_bfloat16() -> None:
    plain, _ = one_step(make_bridge(objective="alm=1,uld=1,shared=1"))
    mixed, grads = one_step(make_bridge(objective="alm=1,uld=1,shared=1", bf16=True))
    assert mixed["loss"] == pytest.approx(plain["loss"], rel=2e-2)
    for objective in ("dskd-cma", "prefix"):
        mixed, _ = one_step(make_bridge(objective=objective, bf16=True))
        assert mixed["loss"] == pytest.approx(one_step(make_bridge(objective=objective))[0]["loss"], rel=2e-2)
    halves = {"model": student().bfloat16(), "teacher_model": teacher().bfloat16()}
    half, _ = one_step(make_bridge(**halves, hidden_weight=1.0, hidden_projector=True))
    assert half["kd"] > 0 and all(gradient.isfinite().all() for gradient in grads.values())


def test_the_layers_are_compared_by_default() -> None:
    trainer = make_bridge(hidden_weight=None)
    assert (trainer.args.hidden_weight, trainer.args.hidden_projector) == (HIDDEN_WEIGHT, True)
    asked = make_bridge(hidden_weight=HIDDEN_WEIGHT, hidden_projector=True)
    _assert_same_run(one_step(trainer), one_step(asked))


def test_layers_that_do_not_pair_up_are_not_compared() -> None:
    def of(**how: Any) -> tuple[Any, Any]:
        args = make_bridge(hidden_weight=None, **how).args
        return args.hidden_weight, args.hidden_projector

    assert of(model=student(num_hidden_layers=4)) == (HIDDEN_WEIGHT, True)
    assert of(model=student(num_hidden_layers=5)) == (0.0, False)
    model = student()
    assert of(model=model, optimizers=(torch.optim.SGD(model.parameters()), None)) == (0.0, False)
