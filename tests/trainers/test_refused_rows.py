"""Rows, places and names that cannot work: a clear error before any work, where it came late or without a cause."""

from typing import Any

import pytest
from datasets import Dataset

from cbd_trl import BridgeDistillConfig, BridgeDistillTrainer, DistillTrainer, build_chain
from cbd_trl.architectures.base import learned_positions
from cbd_trl.cache import write_cache
from tests.tiny import FAMILIES, tiny_model
from tests.tokenizer import tiny_tokenizer
from tests.training import OUTPUT, make_config, make_trainer, text_rows

CHAT = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}]
LONG = text_rows((5, 79))
COMPLETIONS = Dataset.from_dict({"prompt": ["w1 " * 20] * 4, "completion": ["w2"] * 4})


def _without_eos() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_plain_text_needs_an_end_token(name: str) -> None:
    rows: dict[str, Any] = {"train_dataset": Dataset.from_dict({"messages": [CHAT] * 4}), name: text_rows()}
    with pytest.raises(ValueError, match=r"no end token \(eos_token\).*Set tokenizer.eos_token"):
        make_trainer(processing_class=_without_eos(), **rows)


@pytest.mark.parametrize(
    "rows",
    [{"messages": [CHAT] * 4}, {"input_ids": [[7, 8, 9]] * 4}, {"text": ["w1 w2"] * 4}],
    ids=lambda rows: next(iter(rows)),
)
def test_other_rows_do_not(rows: dict[str, Any]) -> None:
    named = {"eos_token": "</s>"} if "text" in rows else {}
    make_trainer(processing_class=_without_eos(), train_dataset=Dataset.from_dict(rows), **named).train()


@pytest.mark.parametrize("family", FAMILIES)
def test_learned_positions(family: str) -> None:
    assert learned_positions(tiny_model(family)) == (64 if family in ("gpt2", "opt") else None)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
@pytest.mark.parametrize(
    "how",
    [
        {"max_length": None},
        {"packing": True, "max_length": 80},
        {"packing": True, "packing_strategy": "wrapped", "max_length": 65},
        {"pad_to_multiple_of": 65},
        {"train_dataset": LONG.to_iterable_dataset(), "max_length": 65},
        {"train_dataset": text_rows(), "eval_dataset": LONG, "max_length": 80},
    ],
    ids=["whole", "packed", "wrapped", "padded", "stream", "evaluated"],
)
def test_rows_are_no_longer_than_learned_positions(family: str, how: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"has learned.* 64 positions|64 positions that the student"):
        make_trainer(family, **{"train_dataset": LONG, **how})
    # Of positions that begin anew with each row, and of those that are computed.
    make_trainer(family, train_dataset=LONG, packing=True, max_length=64).train()
    make_trainer("llama", **{"train_dataset": LONG, **how})


def test_so_it_is_of_a_teacher_a_cache_and_an_evaluation(tmp_path: Any) -> None:
    how = {"train_dataset": LONG, "max_length": 80}
    with pytest.raises(ValueError, match=r"the teacher \(GPT2LMHeadModel\) has learned 64 positions"):
        make_trainer("llama", teacher=tiny_model("gpt2", seed=2), **how)
    for rows in (LONG, LONG.to_iterable_dataset()):
        with pytest.raises(ValueError, match="has 80 tokens, and the teacher"):
            write_cache(
                tiny_model("opt"), rows, tmp_path, processing_class=tiny_tokenizer(), args=make_config(max_length=80)
            )
    trainer = make_trainer("opt", max_length=80)
    with pytest.raises(ValueError, match="evaluation dataset has 80 tokens, and the student"):
        trainer.evaluate(LONG)


@pytest.mark.parametrize("how", [{}, {"packing": True}, {"stream": True}], ids=["padded", "packed", "stream"])
def test_a_length_that_cuts_every_completion(how: dict[str, Any]) -> None:
    rows = COMPLETIONS.to_iterable_dataset() if "stream" in how else COMPLETIONS
    how = {"max_length": 8, "packing": how.get("packing", False)}
    with pytest.raises(ValueError, match=r"max_length=8 .*cuts every completion"):
        make_trainer(train_dataset=rows, **how)
    short = Dataset.from_dict({"prompt": ["w1"] * 4, "completion": [" w2"] * 4})
    with pytest.raises(ValueError, match="the eval dataset is scored"):
        make_trainer(train_dataset=short, eval_dataset=rows, **how)


@pytest.mark.parametrize("way", ["end", "long", "cut", "metric", "no evaluation", "no steps"])
def test_a_build_is_refused_before_its_first_anchor(way: str, tmp_path: Any) -> None:
    """Rows of every anchor are looked at first; the evaluation rows, too."""
    how: dict[str, Any] = {
        "end": {"rows": text_rows(), "tokenizer": _without_eos(), "match": "no end token"},
        "long": {"rows": LONG, "max_length": 80, "match": "Row 1 of the eval dataset has 80 tokens"},
        "cut": {"rows": COMPLETIONS, "max_length": 8, "match": "No token of the training dataset"},
        "no evaluation": {
            "rows": None,
            "eval_strategy": "epoch",
            "match": "'epoch', and there is nothing to evaluate",
        },
        "no steps": {"rows": None, "max_steps": -1, "match": "is a stream.* max_steps=-1"},
        "metric": {
            "rows": text_rows(),
            "metric_for_best_model": "eval_bleu",
            "match": "metric_for_best_model='eval_bleu'",
        },
    }[way]
    tokenizer, rows, match = how.pop("tokenizer", tiny_tokenizer()), how.pop("rows"), how.pop("match")
    trained = rows if way == "cut" else Dataset.from_dict({"messages": [CHAT] * 16})
    trained = trained.to_iterable_dataset() if way == "no steps" else trained
    if way == "metric":
        how |= {"eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(ValueError, match=match):
        build_chain(
            tiny_model("gpt2"),
            [{"n_layer": 2}],
            dataset=trained,
            eval_dataset=rows,
            output_dir=tmp_path / "chain",
            args=make_config(output_dir=str(tmp_path / "work"), **how),
            processing_class=tokenizer,
        )
    assert not (tmp_path / "chain").exists()


@pytest.mark.parametrize("metric", ["eval_bleu", "accuracy", "eval_hidden", "eval_one_loss"])
def test_a_metric_that_no_evaluation_reports(metric: str) -> None:
    how = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": text_rows(), "metric_for_best_model": metric}
    with pytest.raises(ValueError, match=f"metric_for_best_model={metric!r} .*eval_mean_token_accuracy"):
        make_trainer(**how)
    make_trainer(**how, compute_metrics=lambda prediction: {})  # whose names are not known
    make_trainer(**{**how, "eval_strategy": "no"})
    if metric == "eval_one_loss":
        make_trainer(**{**how, "eval_dataset": {"one": text_rows(), "two": text_rows()}})


@pytest.mark.parametrize("metric", ["mean_token_accuracy", "eval_entropy", "eval_kd", "ce", "eval_num_tokens", "loss"])
def test_every_other_metric_can_be_the_best(metric: str, tmp_path: Any) -> None:
    trainer = make_trainer(
        eval_strategy="steps", eval_steps=1, eval_dataset=text_rows(), metric_for_best_model=metric, max_steps=2
    )
    trainer.train()
    reported = [
        entry[f"eval_{metric.removeprefix('eval_')}"] for entry in trainer.state.log_history if "eval_loss" in entry
    ]
    lower = metric.removeprefix("eval_") in ("kd", "ce", "loss")
    assert trainer.args.greater_is_better is not lower
    assert trainer.state.best_metric == (min if lower else max)(reported)


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_ids_that_the_model_has_no_row_for_are_named(name: str, tmp_path: Any) -> None:
    """A model of 64 rows; 63 is the last one."""
    rows = {one: Dataset.from_dict({"input_ids": [[7, 8, 63]] * 4}) for one in ("train_dataset", "eval_dataset")}
    make_trainer(**rows)
    rows[name] = Dataset.from_dict({"input_ids": [[7, 8, 9], [7, 64, 9]] * 2})
    with pytest.raises(ValueError, match=r"token id 64, and the student .* has 64 vocabulary rows"):
        make_trainer(**rows)
    with pytest.raises(ValueError, match=r"token id 64, and the anchor .* has 64 vocabulary rows"):
        build_chain(
            tiny_model("llama"),
            [0.8],
            dataset=rows["train_dataset"],
            eval_dataset=rows["eval_dataset"],
            output_dir=tmp_path / "chain",
            args=make_config(),
            processing_class=tiny_tokenizer(),
        )
    assert not list(tmp_path.iterdir())


ARGS, ROWS, TOKENIZER, MODEL = make_config(), text_rows(), tiny_tokenizer(), tiny_model("llama")


@pytest.mark.parametrize(
    ("places", "match"),
    [
        (
            (MODEL, ARGS),
            "teacher_model of .* is a DistillConfig.*second place is the teacher's.*teacher_model=teacher",
        ),
        ((MODEL, MODEL, ROWS), "args of .* is a Dataset.*as `train_dataset`"),
        ((MODEL, MODEL, TOKENIZER), "args of .*, a tokenizer.*as `processing_class`"),
        ((MODEL, MODEL, ARGS, TOKENIZER), "train_dataset of .*as `processing_class`"),
        ((MODEL, MODEL, ARGS, ROWS, TOKENIZER), "eval_dataset of .*as `processing_class`"),
        ((MODEL, MODEL, ARGS, ROWS, None, MODEL), "processing_class of .*as `model`"),
        ((ROWS,), "model of .*as `train_dataset`"),
        ((MODEL, TOKENIZER), "teacher_model of .*as `processing_class`"),
        ((MODEL, [{"text": "w1"}]), "teacher_model of .* is a list, a dataset.*as `train_dataset`"),
        ((None, MODEL), "model of .* is a NoneType: it must be a causal language model"),
    ],
)
@pytest.mark.parametrize("trainer", [DistillTrainer, BridgeDistillTrainer])
def test_what_stands_in_anothers_place_is_named(trainer: Any, places: tuple[Any, ...], match: str) -> None:
    if trainer is BridgeDistillTrainer:
        places = tuple(BridgeDistillConfig(OUTPUT, use_cpu=True) if place is ARGS else place for place in places)
    with pytest.raises(TypeError, match=match.replace("DistillConfig", "(Bridge)?DistillConfig")):
        trainer(*places)
