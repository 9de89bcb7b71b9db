"""The shipped examples, run as a user runs them: with flags, on a tiny chain."""

import dataclasses
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers import quantizer_bnb_4bit

from cbd_trl import Chain, DistillTrainer, from_chain
from cbd_trl.cli.train import DISTILL
from cbd_trl.recipe.schema import read_recipe
from tests.chain.helpers import build_tiny_chain, same_weights
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
# Of a model between the two lower anchors, and what lets it train anywhere.
SIZE = 20e3
TRAINING = "--use_cpu True --bf16 False --max_steps 2 --learning_rate 1e-2 --report_to none --save_strategy no"
# TRL turns checkpointing off and on around generation by names that transformers 5.23 warns about.
GENERATING = "--max_completion_length 8 --gradient_checkpointing False"

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Chain:
    return build_tiny_chain(tmp_path_factory.mktemp("examples") / "chain")


@pytest.fixture
def run(chain, tmp_path, monkeypatch) -> Run:
    """Run an example on the tiny chain and a folder of rows; what it leaves in its namespace comes back."""
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2} w{i + 3} w{i + 4}"} for i in range(8)]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def run(script: Path | str, flags: str = TRAINING) -> dict[str, Any]:
        path = EXAMPLES / script
        given = ["--chain", chain.name_or_path, "--num_parameters", str(SIZE)]
        if "--repo_id" not in flags:
            given += ["--dataset", str(tmp_path / "rows"), "--output_dir", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", [str(path), *given, *flags.split()])
        return runpy.run_path(str(path), run_name="__main__")

    return run


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(6, 18)[None]).logits


def assert_trained(folder: Path, untrained: Any) -> Any:
    """The model in a folder loads like any other, and is not what training began at."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    assert model.num_parameters() == untrained.num_parameters()
    assert (logits(model) - logits(untrained)).abs().max() > 1e-3
    return model


def test_pico_makes_the_whole_journey(tmp_path, capsys):
    runpy.run_path(str(EXAMPLES / "pico.py"))["main"](tmp_path)
    assert (tmp_path / "chain" / "chain.json").is_file()
    for name in ("small", "tuned"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(tmp_path / name)
        assert model.config.hidden_size < 48
    assert "trained and saved" in capsys.readouterr().out


def test_sft(run, chain, tmp_path):
    run("sft.py")
    assert_trained(tmp_path / "out", from_chain(chain, SIZE))


def test_two_lines_make_a_distillation_of_it(run, chain, tmp_path, monkeypatch):
    diff = (EXAMPLES.parent / "README.md").read_text().split("```diff\n")[1].split("```")[0].splitlines()
    script = (EXAMPLES / "sft.py").read_text()
    removed, added = ([line[1:] for line in diff if line[0] == sign] for sign in "-+")
    assert len(removed) == len(added) == 2 and len(diff) == 4
    for old, new in zip(removed, added, strict=True):
        assert script.count(f"{old}\n") == 1
        script = script.replace(f"{old}\n", f"{new}\n")
    (tmp_path / "changed.py").write_text(script)
    (tmp_path / "my-chain").mkdir()
    (tmp_path / "my-chain" / "135M").symlink_to(chain.anchors[1].path)
    monkeypatch.chdir(tmp_path)
    trainer = run(tmp_path / "changed.py", f"{TRAINING} --logging_steps 1 --divergence jsd")["trainer"]
    assert isinstance(trainer, DistillTrainer) and trainer.args.divergence == "jsd"
    assert trainer.state.log_history[0]["kd"] > 0
    assert_trained(tmp_path / "out", from_chain(chain, SIZE))


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo_and_its_reference(run, chain, tmp_path, beta):
    flags = f"{TRAINING} {GENERATING} --beta {beta} --num_generations 4 --per_device_train_batch_size 4"
    trainer = run("grpo.py", flags)["trainer"]
    untrained = from_chain(chain, SIZE)
    assert_trained(tmp_path / "out", untrained)
    if beta == 0:
        assert trainer.ref_model is None
    else:
        reference = trainer.accelerator.unwrap_model(trainer.ref_model)
        assert same_weights(dict(reference.state_dict()), dict(untrained.state_dict()))
        assert any("kl" in entry for entry in trainer.state.log_history)


def test_the_rule_rewards_answers_that_do_not_repeat_themselves():
    reward = runpy.run_path(str(EXAMPLES / "grpo.py"))["few_repetitions"]
    chat = [[{"role": "assistant", "content": "one two one two"}]]
    assert reward(["one two three four", "one one one one", ""]) == [1.0, 0.25, 0.0]
    assert reward(chat) == [0.5]


def test_on_policy_learns_from_the_upper_anchor(run, chain, tmp_path):
    trainer = run("on_policy.py", f"{TRAINING} {GENERATING}")["trainer"]
    assert_trained(tmp_path / "out", from_chain(chain, SIZE))
    teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)
    assert same_weights(dict(teacher.state_dict()), dict(chain.anchors[1].load_model().state_dict()))


def test_a_merged_adapter_says_what_the_adapter_says(run, chain, tmp_path):
    run("lora.py")
    out = tmp_path / "out"
    base = AutoModelForCausalLM.from_pretrained(out / "base")
    assert same_weights(dict(base.state_dict()), dict(from_chain(chain, SIZE).state_dict()))
    merged = assert_trained(out / "merged", base)
    torch.testing.assert_close(
        logits(merged), logits(PeftModel.from_pretrained(base, out)), rtol=0, atol=1e-5 * logits(merged).std().item()
    )


def test_a_prompt_is_built_into_an_adapter(tmp_path, monkeypatch):
    """Its base with the prompt is its teacher, on answers that it wrote."""
    model, files = tiny_model("llama"), {name: tmp_path / f"{name}.json" for name in ("before", "rows")}
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    files["before"].write_text(json.dumps([{"role": "user", "content": "w1 w2"}]))
    files["rows"].write_text("".join(json.dumps({"prompt": f"w{i} w{i + 1}"}) + "\n" for i in range(8)))
    where = ["--model", "model", "--before", "before.json", "--dataset", "rows.json", "--output_dir", "out"]
    script = str(EXAMPLES / "system_prompt.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *where, "--max_new_tokens", "6", *TRAINING.split()])
    trainer = runpy.run_path(script, run_name="__main__")["trainer"]
    [first, *_] = map(json.loads, (tmp_path / "out" / "answers.jsonl").read_text().splitlines())
    assert [message["content"] for message in first["prompt"]] == ["w1 w2", "w0 w1"]
    rows = tiny_tokenizer().batch_decode(trainer.train_dataset["input_ids"][:])
    assert all(row.count("<user>") == 1 for row in rows)
    assert trainer.state.log_history[0]["kd"] > 0
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "out")
    assert (logits(trained) - logits(model)).abs().max() > 1e-3


def test_a_ternary_student_is_trained_and_loads_as_one(run, chain, tmp_path, monkeypatch):
    # What rounds would be compiled, which takes a minute and changes nothing.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    from transformers.integrations.bitnet import AutoBitLinear

    trainer = run("ternary_student.py", f"{TRAINING} --max_steps 12 --logging_steps 1")["trainer"]
    model = assert_trained(tmp_path / "out", from_chain(chain, SIZE))
    torch.testing.assert_close(logits(model), logits(trainer.model))
    losses = [entry["kd"] for entry in trainer.state.log_history if "kd" in entry]
    assert losses[-1] < losses[0]
    linear = [module for module in model.modules() if isinstance(module, AutoBitLinear)]
    assert len(linear) == 7 * model.config.num_hidden_layers
    assert len(linear[0](torch.eye(linear[0].in_features)).unique()) == 3


def test_a_four_bit_teacher_asks_for_the_extra(run, chain, monkeypatch):
    monkeypatch.setattr(quantizer_bnb_4bit, "is_bitsandbytes_available", lambda: False)
    flags = f"{TRAINING} --teacher_model_name_or_path {chain.anchors[1].path}"
    with pytest.raises(ImportError, match=r"teacher.*33K.*bitsandbytes.*pip install 'cbd-trl\[quantized\]'; or leave"):
        run("four_bit_teacher.py", flags)


def test_a_four_bit_teacher_teaches(run, chain, tmp_path):
    # On a CPU bitsandbytes takes widths in blocks of 64.
    wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    tiny_model("llama", **wide).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    trainer = run("four_bit_teacher.py", f"{TRAINING} --teacher_model_name_or_path {tmp_path / 'teacher'}")["trainer"]
    assert_trained(tmp_path / "out", from_chain(chain, SIZE))
    assert trainer.teacher_model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8


def test_every_key_of_the_yaml_files_is_known():
    keys = yaml.safe_load((EXAMPLES / "distill.yaml").read_text())
    fields = {field.name for kind in DISTILL.types() for field in dataclasses.fields(kind)}
    assert keys.keys() <= fields
    assert not read_recipe(EXAMPLES / "build.yaml").problems


def test_every_example_is_short():
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py") if path.stem != "pico"}
    assert len(lengths) >= 7 and max(lengths.values()) < 80, lengths
