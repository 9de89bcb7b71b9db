"""Every place that takes a data set reads it alike: what cannot be read is refused before any model is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from cbd_trl import BridgeDistillTrainer, BridgeStep, DistillTrainer, build_chain, chain_from_anchors, from_chain
from cbd_trl.cache import TeacherCache
from cbd_trl.cache.writer import write_cache
from cbd_trl.chain.chain import Chain
from cbd_trl.generation.generate import generate_completions
from cbd_trl.recipe.data import check_data, load_data
from cbd_trl.recipe.schema import DataPart
from cbd_trl.report.measure import ReportOptions, measure_chains
from tests.chain.helpers import chain_config
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer
from tests.trainers import bridge_runs
from tests.training import assert_same_gradient, make_config, make_trainer, one_step, text_rows

NOWHERE = "no/model"
GOOD = Dataset.from_dict({"text": ["w1 w2"]})


def _distil(dataset: Any, folder: Path) -> None:
    DistillTrainer(NOWHERE, NOWHERE, make_config(), dataset, processing_class=tiny_tokenizer())


def _distil_and_evaluate(dataset: Any, folder: Path) -> None:
    evaluation = dataset if not isinstance(dataset, DatasetDict) else {"held_out": dataset}
    DistillTrainer(NOWHERE, NOWHERE, make_config(), GOOD, evaluation, processing_class=tiny_tokenizer())


def _bridge(dataset: Any, folder: Path) -> None:
    BridgeDistillTrainer(NOWHERE, NOWHERE, bridge_runs.make_bridge_config(), dataset)


def _build(dataset: Any, folder: Path, **options: Any) -> None:
    how = {"args": chain_config(), "processing_class": tiny_tokenizer(), "output_dir": folder / "chain", **options}
    build_chain(how.pop("source", NOWHERE), how.pop("anchors", [0.5]), dataset=dataset, **how)


def _build_and_evaluate(dataset: Any, folder: Path) -> None:
    _build(GOOD, folder, eval_dataset={"held_out": dataset} if isinstance(dataset, DatasetDict) else dataset)


def _build_an_anchor(dataset: Any, folder: Path) -> None:
    _build(GOOD, folder, source=tiny_model("llama"), anchors=[{"num_hidden_layers": 2, "dataset": dataset}])


def _build_on_a_bridge(dataset: Any, folder: Path) -> None:
    own = bridge_runs.students_tokenizer()
    step = BridgeStep(bridge_runs.student(), own, bridge_runs.make_bridge_config(), dataset)
    source = {"source": bridge_runs.teacher(), "processing_class": bridge_runs.teachers_tokenizer()}
    _build(GOOD, folder, bridge=step, **source)


def _join(dataset: Any, folder: Path) -> None:
    chain_from_anchors([NOWHERE, NOWHERE], dataset=dataset, output_dir=folder / "chain")


def _cache(dataset: Any, folder: Path) -> None:
    write_cache(NOWHERE, dataset, folder / "cache", processing_class=tiny_tokenizer(), args=make_config())


def _generate(dataset: Any, folder: Path) -> None:
    generate_completions(NOWHERE, dataset, folder / "out.jsonl", processing_class=tiny_tokenizer(), use_cpu=True)


def _measure(dataset: Any, folder: Path) -> None:
    measure_chains([], dataset, ReportOptions())


DOORS: list[Callable[[Any, Path], None]] = [
    *(_distil, _distil_and_evaluate, _bridge, _build, _build_and_evaluate, _build_an_anchor, _build_on_a_bridge),
    *(_join, _cache, _generate, _measure),
]
CHAT = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
BAD = {
    "splits": (DatasetDict({"one": GOOD, "two": GOOD}), "DatasetDict with the splits 'one', 'two'"),
    "None": (Dataset.from_dict({"messages": [CHAT, CHAT, None]}), r"Row 2 .*has None in the column 'messages'"),
    "other columns": (Dataset.from_dict({"question": ["w1"]}), r"has the columns \['question'\]"),
    "empty chats": ([{"messages": []}], "nothing but empty chats"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__.strip("_"))
def test_a_dataset_is_refused_before_any_work(door: Callable[[Any, Path], None], name: str, tmp_path: Path) -> None:
    dataset, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        door(dataset, tmp_path)
    assert not list(tmp_path.iterdir())


CHATS = [*([CHAT] * 6), [], *([CHAT[::-1]] * 6)]
MIXED = Dataset.from_dict({"prompt": ["w1"] * 13, "messages": CHATS, "id": range(13)})
CLEAN = Dataset.from_dict({"messages": [chat for chat in CHATS if chat]})


def test_the_same_rows_are_trained_evaluated_cached_measured_and_calibrate(tmp_path: Path) -> None:
    trained = make_trainer(train_dataset=MIXED, eval_dataset=MIXED.select(range(7)))
    expected: Any = make_trainer(train_dataset=CLEAN).train_dataset
    rows: Any = trained.train_dataset
    assert rows["input_ids"] == expected["input_ids"] and len(rows) == 12
    losses = [trained.evaluate(data)["eval_loss"] for data in (None, MIXED.select(range(7)), [{"messages": CHAT}])]
    assert losses == pytest.approx([losses[0]] * 3)
    manifest = write_cache(
        tiny_model("llama"), MIXED, tmp_path / "cache", processing_class=tiny_tokenizer(), args=make_config()
    )
    cache = TeacherCache.open(tmp_path / "cache")
    cache.check_rows(torch.tensor(row).numpy() for row in rows["input_ids"])
    assert manifest.rows == 2  # each chat once
    chains = [
        build_chain(
            tiny_model("llama"),
            [{"num_hidden_layers": 2}],
            dataset=data,
            output_dir=tmp_path / str(number),
            args=chain_config(max_steps=1),
            processing_class=tiny_tokenizer(),
            calibration_tokens=64,
        )
        for number, data in enumerate((MIXED, CLEAN, MIXED.to_list()))
    ]
    files = [[anchor.statistics_file.read_bytes() for anchor in chain.anchors] for chain in chains]
    assert [list(map(len, each)) for each in files] == [list(map(len, files[0]))] * 3
    weights = [chain.anchors[1].load_model().state_dict() for chain in chains]
    assert all(torch.equal(weights[0][key], other[key]) for other in weights[1:] for key in weights[0])
    target: dict[str, Any] = {"config": {"num_hidden_layers": 3}, "operator": "slice"}
    made = [from_chain(chains[0], calibration_dataset=data, **target).state_dict() for data in (MIXED, CLEAN)]
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])
    measured = [_losses(chains[0], data) for data in (MIXED, CLEAN, CLEAN.to_list())]
    assert measured[0] == measured[1] == measured[2]
    rows = [{"story": "w1 w2 w3", "messages": CHAT}] * 20
    assert _losses(chains[0], rows, "story") == _losses(chains[0], [{"text": "w1 w2 w3"}] * 20) != measured[0]
    assert _losses(chains[0], rows) == _losses(chains[0], [{"messages": CHAT}] * 20)


def _losses(chain: Chain, rows: Any, column: str = "text") -> list[float]:
    options = ReportOptions(sizes=[], blocks=4, block_length=8, text_field=column)
    return [anchor["loss"] for anchor in measure_chains([chain], rows, options)[0]["anchors"]]


def test_a_chain_is_trained_on_chats_in_the_template_it_is_given(tmp_path: Path) -> None:
    tokenizer, file = tiny_tokenizer(), tmp_path / "chat.jinja"
    file.write_text(str(tokenizer.chat_template))
    tokenizer.chat_template = None
    chain = build_chain(
        tiny_model("llama"),
        [{"num_hidden_layers": 2}],
        dataset=CLEAN,
        output_dir=tmp_path / "chain",
        args=chain_config(max_steps=1, chat_template_path=str(file)),
        processing_class=tokenizer,
        calibration_tokens=64,
    )
    assert chain.anchors[1].load_tokenizer().chat_template == file.read_text()


def _raw(tokenizer: PreTrainedTokenizerFast) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """A user's collator, which makes the tokens."""
    make = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return lambda examples: make([tokenizer(example["text"] + tokenizer.eos_token) for example in examples])


OWN = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}


@pytest.mark.parametrize("template", [None, bridge_runs.TEMPLATE])
def test_a_bridge_takes_a_collator_that_makes_the_tokens(template: str | None) -> None:
    rows, tokenizer = Dataset.from_dict({"text": bridge_runs.texts()}), bridge_runs.students_tokenizer()
    teachers = bridge_runs.make_tokenizer("byte_level", 420, seed=1)
    teachers.chat_template = template
    options: dict[str, Any] = {"args": None, "train_dataset": rows, "eval_dataset": rows}
    made = []
    for own, collator in ((OWN, _raw(tokenizer)), ({}, None)):
        options["args"] = bridge_runs.make_bridge_config(eval_strategy="no", **own)
        trainer = BridgeDistillTrainer(
            bridge_runs.student(),
            bridge_runs.teacher(),
            data_collator=collator,
            processing_class=tokenizer,
            teacher_processing_class=teachers,
            **options,
        )
        made.append((*one_step(trainer), trainer.evaluate()["eval_loss"]))
    (ours, our_gradient, our_loss), (theirs, their_gradient, their_loss) = made
    assert_same_gradient(our_gradient, their_gradient)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5) and ours["unaligned"] == theirs["unaligned"]
    assert our_loss == pytest.approx(their_loss, rel=1e-5)


def test_a_cached_teacher_takes_a_collator_that_makes_the_tokens(tmp_path: Path) -> None:
    rows, tokenizer = text_rows(), tiny_tokenizer()
    write_cache(tiny_model("llama", seed=2), rows, tmp_path, processing_class=tokenizer, args=make_config())
    made = []
    for own, collator in ((OWN, _raw(tokenizer)), ({}, None)):
        trainer = DistillTrainer(
            tiny_model("llama", seed=1),
            None,
            make_config(teacher_cache=str(tmp_path), **own),
            rows,
            data_collator=collator,
            processing_class=tokenizer,
        )
        made.append(one_step(trainer))
    assert_same_gradient(made[0][1], made[1][1])
    assert made[0][0]["loss"] == pytest.approx(made[1][0]["loss"], rel=1e-5)


TOOLS = [{"type": "function", "function": {"name": "w40", "parameters": {}}}]


def test_a_recipe_keeps_what_is_trained_on(tmp_path: Path) -> None:
    rows: dict[str, list[dict[str, Any]]] = {
        "tools": [{"id": 1, "messages": CHAT, "tools": TOOLS, "chat_template_kwargs": {"mood": "w1"}}] * 4,
        "ultrachat": [{"prompt": "w1", "prompt_id": "x", "messages": CHAT}] * 4,
        "sharegpt": [{"conversations": [{"from": "user", "value": "w1"}], "score": 1.0}] * 4,
        "labels": [{"input_ids": [7, 8], "labels": [-100, 8], "source": "x"}] * 4,
        "text": [{"text": "w1", "tools": TOOLS, "id": 1}] * 4,
        "empty": [{"messages": CHAT, "id": n} for n in range(4)] + [{"messages": [], "id": 4}],
    }
    kept = {
        "tools": ["messages", "tools", "chat_template_kwargs"],
        "ultrachat": ["messages"],
        "sharegpt": ["conversations"],
        "labels": ["input_ids", "labels"],
        "text": ["text"],
        "empty": ["messages"],
    }
    for name, every in rows.items():
        file = tmp_path / f"{name}.jsonl"
        Dataset.from_list(every).to_json(file)
        part = DataPart(name=str(file))
        assert check_data(part, tiny_tokenizer()) == load_data([part], tiny_tokenizer(), 0).column_names == kept[name]
        assert len(load_data([part], None, 0)) == 4
    parts = [DataPart(name=str(tmp_path / f"{name}.jsonl"), share=0.5) for name in ("ultrachat", "empty")]
    assert load_data(parts, None, 0).column_names == ["messages"]
