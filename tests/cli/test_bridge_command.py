"""`cbd-trl build --bridge`."""

import json
from pathlib import Path

import pytest

from cbd_trl import Chain
from cbd_trl.cli.main import main
from cbd_trl.cli.parsing import parse_bridge
from tests.build.bridged import ANCHORS, anchor_zero, rows, source
from tests.trainers.bridge_runs import students_tokenizer, teachers_tokenizer

TRAINING = [
    *("--max_steps", "2", "--per_device_train_batch_size", "2", "--max_length", "32", "--report_to", "none"),
    *("--use_cpu", "--bf16", "false", "--gradient_checkpointing", "false", "--dataloader_pin_memory", "false"),
    *("--save_strategy", "no", "--disable_tqdm", "true", "--swap_probability", "0"),
]


def test_build_with_a_bridge(tmp_path: Path) -> None:
    for name, model, tokenizer in (
        ("source", source(), teachers_tokenizer()),
        ("zero", anchor_zero(), students_tokenizer()),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    for name, seed in (("rows", 0), ("own", 5)):
        rows(seed=seed).to_json(tmp_path / f"{name}.jsonl")
    (tmp_path / "build.yaml").write_text(
        f"source: {tmp_path / 'source'}\n"
        f"dataset_name: {tmp_path / 'rows.jsonl'}\n"
        f"anchors: [{json.dumps(ANCHORS[0])}]\n"
        "bridge:\n"
        f"  model: {tmp_path / 'zero'}\n"
        "  args: {objective: 'uld', max_steps: 1}\n"
        f"  dataset: {tmp_path / 'own.jsonl'}\n"
        "calibration_tokens: 64\n"
    )
    flags = ["--config", str(tmp_path / "build.yaml"), *TRAINING, "--output_dir", str(tmp_path / "chain")]
    assert main(["build", *flags]) == 0
    upper, lower = Chain.from_pretrained(tmp_path / "chain").anchors
    told = upper.training["bridge"]["arguments"]["values"]
    assert (told["objective"], told["max_steps"], lower.arguments["max_steps"]) == (
        '{"uld": 1.0}',
        1,
        2,
    )
    # What trains the anchors trains it too, and what compares models of one tokenizer does not.
    assert (told["max_length"], told["per_device_train_batch_size"], told["divergence"]) == (32, 2, None)


def test_parse_bridge() -> None:
    assert parse_bridge('{"model": "m"}') == {"model": "m"} == parse_bridge({"model": "m"})
    assert parse_bridge(None) is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("zero", r"--bridge: 'zero' is not JSON"),
        ("[1]", r"'\[1\]' is not an object with a `model`, and `args` and `dataset` where they are wanted\. Write"),
        ('{"args": {}}', r"is not an object with a `model`"),
        ('{"model": "m", "tokenizer": "t"}', r"is not an object with a `model`"),
    ],
)
def test_what_is_no_bridge_is_refused(value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_bridge(value)


def test_an_unknown_argument_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    bridge = '{"model": "m", "args": {"lerning_rate": 1}}'
    flags = ["--source", "x", "--dataset_name", "y", "--use_cpu", "--anchors", "0.5", "--bridge", bridge]
    assert main(["build", *flags]) == 1
    assert "['lerning_rate'] in args are no fields of BridgeDistillConfig" in capsys.readouterr().err
