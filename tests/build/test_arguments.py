"""Training arguments of a chain: every field is recorded and compared, or excluded by name; some are refused."""

import dataclasses
import json
import logging
from enum import Enum
from typing import Any, get_args, get_type_hints

import pytest

from cbd_trl import BridgeDistillConfig, DistillConfig
from cbd_trl.build.arguments import (
    MEASURED,
    NOT_RECORDED,
    REFUSED,
    TEACHER_ARGUMENTS,
    changed_arguments,
    check_chain_arguments,
    then_and_now,
    training_record,
)
from tests.tokenizer import tiny_tokenizer
from tests.trainers.bridge_runs import make_bridge_config
from tests.training import make_config

EXCLUDED = {name for names in NOT_RECORDED.values() for name in names}
CONFIGS = {DistillConfig: make_config, BridgeDistillConfig: make_bridge_config}
FIELDS = [(config, field.name) for config in CONFIGS for field in dataclasses.fields(config)]
# Where a field takes no other value of its type.
OTHERS = {
    "lr_scheduler_type": "cosine",
    "objective": "uld",
    "optim": "sgd",
    "model_init_kwargs": {"dtype": "bfloat16"},
}


def another(config: type, name: str, value: Any) -> Any:
    """A value of a field's type that is not this one."""
    kind = get_type_hints(config)[name]
    kinds = [kind, *get_args(kind), *(inner for arg in get_args(kind) for inner in get_args(arg))]
    values = [True, False, 7, 0.375, "other", {"a": 1}, ["a"], OTHERS.get(name)]
    fitting = [OTHERS[name]] if name in OTHERS else [v for v in values if type(v) in kinds or (dict in kinds and v)]
    return next((other for other in fitting if other != value and other is not None), "other")


def changed(config: type, **changes: Any) -> list[str]:
    """What is noticed of changes that are made to finished arguments."""
    before, after = CONFIGS[config](), CONFIGS[config]()
    for name, value in changes.items():
        setattr(after, name, value)
    records = (json.loads(json.dumps(training_record(args))) for args in (before, after))
    return changed_arguments(*records)


@pytest.mark.parametrize(("config", "name"), FIELDS, ids=lambda entry: getattr(entry, "__name__", entry))
def test_a_change_of_any_field_is_noticed_or_the_field_is_excluded_by_name(config: type, name: str) -> None:
    value = another(config, name, getattr(CONFIGS[config](), name))
    assert changed(config, **{name: value}) == ([] if name in EXCLUDED or name in MEASURED else [name])


def test_what_trains_otherwise_is_not_excluded() -> None:
    trains = {"completion_only_loss", "assistant_only_loss", "dataset_text_field", "data_seed", "neftune_noise_alpha"}
    trains |= {"eos_token", "pad_token", "chat_template_path", "auto_find_batch_size", "accelerator_config"}
    trains |= {"load_best_model_at_end", "dataloader_drop_last", "loss_type", "truncation_mode", "optim_args"}
    assert not trains & (EXCLUDED | set(MEASURED))


@pytest.mark.parametrize("why", [{"load_best_model_at_end": True}, {"lr_scheduler_type": "reduce_lr_on_plateau"}])
def test_evaluations_count_where_they_decide(why: dict[str, Any]) -> None:
    before, after = make_config(), make_config()
    for name, value in {**why, "eval_steps": 3}.items():
        setattr(before, name, value)
        setattr(after, name, value)
    after.eval_steps = 5
    assert changed_arguments(training_record(before), training_record(after)) == ["eval_steps"]


def test_a_field_that_a_later_transformers_adds_is_recorded() -> None:
    later = dataclasses.make_dataclass("Later", [("momentum_decay", float, 0.5)], bases=(DistillConfig,))
    args = later(output_dir="unused", use_cpu=True, bf16=False, momentum_decay=0.25)
    assert training_record(args)["values"]["momentum_decay"] == 0.25
    assert "momentum_decay" in training_record(args)["non_default"]


def test_a_default_that_has_moved_since_is_no_change() -> None:
    now = training_record(make_config())
    assert "weight_decay" not in now["non_default"] and now["versions"].keys() >= {"transformers", "trl", "cbd-trl"}
    then = {**now, "values": {**now["values"], "weight_decay": 0.1}, "versions": {"transformers": "5.0.0"}}
    assert changed_arguments(then, now) == []
    # Then it was given, or it is now.
    assert changed_arguments({**then, "non_default": [*now["non_default"], "weight_decay"]}, now) == ["weight_decay"]
    assert changed_arguments(then, training_record(make_config(weight_decay=0.2))) == ["weight_decay"]
    assert changed_arguments(then, training_record(make_config(weight_decay=0.1))) == []


def test_what_an_older_record_lacks_is_not_compared_and_named(caplog: pytest.LogCaptureFixture) -> None:
    """An older record says nothing of defaults either: all that it has is compared."""
    older = {"values": {"learning_rate": 1e-2, "adam_beta2": 0.99}}
    now = training_record(make_config(neftune_noise_alpha=5.0))
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        assert changed_arguments(older, now) == ["adam_beta2"]
        assert "does not record" in caplog.text and "neftune_noise_alpha" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


def test_no_secret_and_no_place_is_recorded(tmp_path: Any) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    options = {"dtype": "bfloat16", "token": "hf_secret", "cache_dir": str(tmp_path), "revision": "main"}
    args = make_config(model_init_kwargs=options, chat_template_path=str(template), hub_token="hf_secret")
    record = training_record(args)
    assert record["values"]["model_init_kwargs"] == '{"dtype": "bfloat16", "revision": "main"}'
    assert "hf_secret" not in json.dumps(record) and str(tmp_path) not in json.dumps(record)
    template.write_text("{{ messages | upper }}")
    assert changed_arguments(record, training_record(args)) == ["chat_template_path"]


def test_a_template_in_a_folder_is_what_the_folder_says(tmp_path: Any) -> None:
    tokenizer, records = tiny_tokenizer(), []
    for folder, template in (("a/tokenizer", "{{ 1 }}"), ("b/tokenizer", "{{ 2 }}"), ("moved", "{{ 1 }}")):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / folder)
        records.append(training_record(make_config(chat_template_path=str(tmp_path / folder))))
    assert changed_arguments(records[0], records[1]) == ["chat_template_path"]
    assert changed_arguments(records[0], records[2]) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"push_to_hub": True}, r"push_to_hub=True: .*one repository.*cbd-trl push FOLDER"),
        ({"save_only_model": True}, r"save_only_model=True: .*without optimizer.*Leave it out"),
        ({"ignore_data_skip": True}, r"ignore_data_skip=True: .*rows before it once more"),
        ({"resume_from_checkpoint": "folder"}, r"resume_from_checkpoint='folder': .*by itself"),
        *(({name: True}, rf"set {name}, but its teacher is X") for name in TEACHER_ARGUMENTS),
    ],
)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_what_would_go_wrong_in_a_build_is_refused(config: type, fields: dict[str, Any], message: str) -> None:
    assert {*REFUSED, *TEACHER_ARGUMENTS} >= fields.keys()
    args = CONFIGS[config]()
    check_chain_arguments(args, "a chain", "its teacher is X")
    for name, value in fields.items():
        setattr(args, name, value)
    with pytest.raises(ValueError, match=rf"The args of a chain set .*{message.removeprefix('set ')}"):
        check_chain_arguments(args, "a chain", "its teacher is X")


def test_enums_are_recorded_by_value() -> None:
    record = training_record(make_config(lr_scheduler_type="cosine"))["values"]
    assert record["lr_scheduler_type"] == "cosine" and not any(isinstance(entry, Enum) for entry in record.values())


def test_changed_values_are_shown_where_they_look_different() -> None:
    there, now = {"steps": 2, "data": "x" * 99 + "a"}, {"steps": 3, "data": "x" * 99 + "b"}
    assert then_and_now(["data", "steps"], there, now) == " (there: 2; now: 3)"
    assert then_and_now(["data", "unknown"], there, now) == ""
