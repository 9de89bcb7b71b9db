"""`cbd-trl build` of a recipe with a bridge."""

import json
from pathlib import Path

from cbd_trl import Chain
from cbd_trl.cli.main import main
from tests.build.bridged import ANCHORS, anchor_zero, rows, source
from tests.recipe.helpers import ARGS
from tests.trainers.bridge_runs import students_tokenizer, teachers_tokenizer


def test_build_with_a_bridge(tmp_path: Path) -> None:
    for name, model, tokenizer in (
        ("source", source(), teachers_tokenizer()),
        ("zero", anchor_zero(), students_tokenizer()),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    for name, seed in (("rows", 0), ("own", 5)):
        rows(seed=seed).to_json(tmp_path / f"{name}.jsonl")
    recipe = {
        "source": str(tmp_path / "source"),
        "data": str(tmp_path / "rows.jsonl"),
        "anchors": [{"shape": ANCHORS[0]}],
        "bridge": {
            "model": str(tmp_path / "zero"),
            "args": {"objective": "uld", "max_steps": 1},
            "data": str(tmp_path / "own.jsonl"),
        },
        "output_dir": str(tmp_path / "chain"),
        "calibration_tokens": 64,
        "args": {**ARGS, "max_length": 32, "swap_probability": 0.0},
    }
    (tmp_path / "build.yaml").write_text(json.dumps(recipe))
    assert main(["build", str(tmp_path / "build.yaml")]) == 0
    upper, lower = Chain.from_pretrained(tmp_path / "chain").anchors
    trained = upper.training["bridge"]["arguments"]["values"]
    assert (trained["objective"], trained["max_steps"], lower.arguments["max_steps"]) == (
        '{"uld": 1.0}',
        1,
        2,
    )
    # What trains the anchors trains it too, and what compares models of one tokenizer does not.
    assert (trained["max_length"], trained["per_device_train_batch_size"], trained["divergence"]) == (32, 2, None)
