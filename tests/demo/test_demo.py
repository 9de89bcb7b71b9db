"""The demo's stages on a model of a few thousand parameters: the same code, another recipe."""

import json

import pytest
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from cbd_trl import DistillTrainer
from cbd_trl.demo import run as run_module
from cbd_trl.demo.run import Demo
from cbd_trl.recipe import corpus
from cbd_trl.recipe import run as recipe_run
from cbd_trl.recipe.run import RESULTS
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer

RECIPE = {
    "source": "given below",
    "data": {"name": "demo", "split": "train"},
    "anchors": [
        {"shape": {"num_hidden_layers": 4}, "args": {"learning_rate": 1e-3, "swap_probability": 0.5}},
        {
            "shape": {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24},
            "args": {"learning_rate": 1e-3, "swap_probability": 0.5},
        },
    ],
    "evaluation": {
        "data": {"name": "demo", "split": "held_out"},
        "sizes": [{"num_hidden_layers": 5}, {"hidden_size": 24, "num_attention_heads": 4}],
        "operators": ["nested", "linear", "slice", "expand", "random"],
        "tokens": 96,
        "length": 24,
    },
    "output_dir": "given below",
    "calibration_tokens": 96,
    "args": {
        "per_device_train_batch_size": 2,
        "max_length": 24,
        "packing": True,
        "packing_strategy": "wrapped",
        "gradient_checkpointing": False,
        "save_total_limit": 1,
        "report_to": "none",
    },
}
OPERATORS = ["nested", "linear", "slice", "expand", "random"]


def rows(limit=None):
    texts = [" ".join(f"w{(3 * i + 2 * j) % 54}" for j in range(10)) for i in range(200)]
    return [{"prompt": text, "completion": text, "complete": i % 2 == 0} for i, text in enumerate(texts)][:limit]


@pytest.fixture
def output(tmp_path, monkeypatch):
    """A demo folder whose source is already there, as after the first stage."""
    monkeypatch.setattr(corpus, "read_rows", rows)
    monkeypatch.setattr(run_module, "bf16_pays", lambda: False)
    monkeypatch.setattr(run_module, "PROMPT", "w1 w2 w3")
    monkeypatch.setattr(run_module, "ANSWER_TOKENS", 4)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    model = tiny_model("llama", num_hidden_layers=6, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path


def demo(output, **options):
    return Demo(output, recipe=output / "recipe.yaml", console=Console(width=120), **{"steps": 2, **options})


def test_demo_writes_everything_and_a_second_run_redoes_only_what_is_missing(output, capsys, monkeypatch):
    report = demo(output).run()

    assert report == json.loads((output / "report.json").read_text())
    assert {"anchors", "targets", "seconds"} <= report.keys()
    assert len(report["anchors"]) == 3 and all(
        {"name", "num_parameters", "loss"} <= a.keys() for a in report["anchors"]
    )
    for target in report["targets"]:
        assert {"num_parameters", "shape", "seconds", "loss"} <= target.keys()
        assert list(target["loss"]) == OPERATORS
    assert report["targets"][0]["shape"]["num_hidden_layers"] == 5
    assert len(report["answers"]) == 5
    for name in ("report.md", "loss.png", "loss.svg", "chain/chain.json"):
        assert (output / name).stat().st_size > 0

    folder = report["model"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == report["targets"][0]["num_parameters"]
    AutoTokenizer.from_pretrained(folder)
    generate = pipeline("text-generation", model=folder)
    assert generate("w1 w2", max_new_tokens=2, do_sample=False)[0]["generated_text"].startswith("w1 w2")
    shown = capsys.readouterr().out
    assert folder in shown and " left)" in shown and "AutoModelForCausalLM" in shown

    # One measurement is lost: the second run makes that one and no other.
    kept = output / "chain" / RESULTS
    results = json.loads(kept.read_text())
    del results[next(iter(results))]
    kept.write_text(json.dumps(results))
    measured = []
    held_out_loss = recipe_run.held_out_loss
    monkeypatch.setattr(recipe_run, "held_out_loss", lambda *args: measured.append(args) or held_out_loss(*args))
    monkeypatch.setattr(run_module, "answer", lambda *args: pytest.fail("an answer was made again"))
    weights = (output / "chain" / report["anchors"][1]["name"] / "model.safetensors").stat().st_mtime_ns
    again = demo(output, steps=None).run()
    assert len(measured) == 1
    assert again["answers"] == report["answers"]
    assert [anchor["loss"] for anchor in again["anchors"]] == [anchor["loss"] for anchor in report["anchors"]]
    assert [target["loss"] for target in again["targets"]] == [target["loss"] for target in report["targets"]]
    assert again["seconds"] > report["seconds"]
    assert (output / "chain" / report["anchors"][1]["name"] / "model.safetensors").stat().st_mtime_ns == weights


def test_an_interrupted_demo_keeps_its_anchors(output, monkeypatch):
    trained = []

    class Interrupted(DistillTrainer):
        def train(self, *args, **kwargs):
            trained.append(self)
            if len(trained) == 2:
                raise KeyboardInterrupt
            return super().train(*args, **kwargs)

    monkeypatch.setattr("cbd_trl.build.build.DistillTrainer", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo(output).run()
    weights = {path: path.stat().st_mtime_ns for path in (output / "chain").glob("[!.]*/model.safetensors")}
    assert len(weights) == 2
    again = demo(output)
    report = again.run()
    assert again.check.finished == 2 and len(trained) == 3
    assert len(report["anchors"]) == 3
    assert weights == {path: path.stat().st_mtime_ns for path in weights}


def test_other_settings_in_the_same_folder_are_refused(output):
    demo(output)
    assert demo(output, steps=None).settings.steps == 2
    with pytest.raises(ValueError, match=r"other settings than --steps 3 \(there: 2\).*another --output"):
        demo(output, steps=3)
    with pytest.raises(ValueError, match=r"--seed 5 \(there: 0\)"):
        demo(output, seed=5)
    recipe = {**RECIPE, "calibration_tokens": 48}
    (output / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match="another recipe"):
        demo(output)


def test_no_steps_are_refused(output):
    with pytest.raises(ValueError, match="--steps 0: an anchor needs at least one step"):
        demo(output, steps=0)


def test_where_there_is_no_terminal_tables_are_not_squeezed(output):
    assert Demo(output, recipe=output / "recipe.yaml", steps=2).console.width > 120
