"""The demo's stages on a model of a few thousand parameters: the same code, another plan."""

import json
from dataclasses import replace

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from cbd_trl.demo import plan as settings
from cbd_trl.demo import run as run_module
from cbd_trl.demo.plan import Plan
from cbd_trl.demo.run import Demo
from cbd_trl.recipe import corpus
from cbd_trl.report.sweep import SweepTarget
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer

PLAN = Plan(
    anchors=(
        {"num_hidden_layers": 4},
        {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24},
    ),
    learning_rates=(1e-3, 1e-3),
    swap_probabilities=(0.5, 0.5),
    targets=(
        SweepTarget(config={"num_hidden_layers": 5}),
        SweepTarget(config={"hidden_size": 24, "num_attention_heads": 4}),
    ),
    saved=1,
    batch_size=2,
    max_length=24,
    held_out_length=24,
    calibration_tokens=96,
    held_out_blocks=4,
    prompt="w1 w2 w3",
    answer_tokens=4,
)
OPERATORS = ["nested", "linear", "slice", "expand", "random"]


def rows(limit=None):
    texts = [" ".join(f"w{(3 * i + 2 * j) % 54}" for j in range(10)) for i in range(200)]
    return [{"prompt": text, "completion": text, "complete": i % 2 == 0} for i, text in enumerate(texts)][:limit]


@pytest.fixture
def output(tmp_path, monkeypatch):
    """A demo folder whose source is already there, as after the first stage."""
    monkeypatch.setattr(corpus, "read_rows", rows)
    monkeypatch.setattr(settings, "bf16_pays", lambda: False)
    model = tiny_model("llama", num_hidden_layers=6, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path


def demo(output, plan=PLAN, **options):
    return Demo(output, plan=plan, console=Console(width=120), **{"steps": 2, **options})


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
    assert model.num_parameters() == report["targets"][1]["num_parameters"]
    AutoTokenizer.from_pretrained(folder)
    generate = pipeline("text-generation", model=folder)
    assert generate("w1 w2", max_new_tokens=2, do_sample=False)[0]["generated_text"].startswith("w1 w2")
    shown = capsys.readouterr().out
    assert folder in shown and " left)" in shown and "AutoModelForCausalLM" in shown

    # One measurement is lost: the second run makes that one and no other.
    results = json.loads((output / "results.json").read_text())
    lost = next(key for key, value in results.items() if isinstance(value, dict) and "loss" in value)
    del results[lost]
    (output / "results.json").write_text(json.dumps(results))
    measured = []
    held_out_loss = run_module.held_out_loss
    monkeypatch.setattr(run_module, "held_out_loss", lambda *args: measured.append(args) or held_out_loss(*args))
    monkeypatch.setattr(run_module, "answer", lambda *args: pytest.fail("an answer was made again"))
    weights = (output / "chain" / report["anchors"][1]["name"] / "model.safetensors").stat().st_mtime_ns
    again = Demo(output, plan=PLAN, console=Console(width=120)).run()
    assert len(measured) == 1
    assert again["answers"] == report["answers"]
    assert [anchor["loss"] for anchor in again["anchors"]] == [anchor["loss"] for anchor in report["anchors"]]
    assert [target["loss"] for target in again["targets"]] == [target["loss"] for target in report["targets"]]
    assert again["seconds"] > report["seconds"]
    assert (output / "chain" / report["anchors"][1]["name"] / "model.safetensors").stat().st_mtime_ns == weights


def test_an_interrupted_demo_keeps_its_anchors(output, monkeypatch):
    first = demo(output)
    build_chain = run_module.build_chain

    def interrupted(source, anchors, **options):
        if len(anchors) == 2:
            raise KeyboardInterrupt
        return build_chain(source, anchors, **options)

    monkeypatch.setattr(run_module, "build_chain", interrupted)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    monkeypatch.setattr(run_module, "build_chain", build_chain)
    again = demo(output)
    assert again._anchors_built() == 1
    weights = next((output / "chain").glob("*/model.safetensors")).stat().st_mtime_ns
    report = again.run()
    assert len(report["anchors"]) == 3
    assert weights in {path.stat().st_mtime_ns for path in (output / "chain").glob("*/model.safetensors")}


def test_other_settings_in_the_same_folder_are_refused(output):
    demo(output)
    assert demo(output, steps=None).settings.steps == 2
    with pytest.raises(ValueError, match=r"other settings than --steps 3 \(there: 2\).*another --output"):
        demo(output, steps=3)
    with pytest.raises(ValueError, match=r"--seed 5 \(there: 0\)"):
        demo(output, seed=5)
    with pytest.raises(ValueError, match="another plan"):
        demo(output, plan=replace(PLAN, saved=0))


def test_no_steps_are_refused(output):
    with pytest.raises(ValueError, match="--steps 0: an anchor needs at least one step"):
        demo(output, steps=0)
