"""The command line: what runs, what fails, and its errors."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from cbd_trl import BridgeDistillConfig, Chain, DistillConfig
from cbd_trl.cache import TeacherCache
from cbd_trl.cli import cache, consolidate, demo, generate, init, push, report, train
from cbd_trl.cli.main import COMMANDS, main
from cbd_trl.cli.parsing import parse_shape
from cbd_trl.recipe.schema import parse_recipe
from cbd_trl.utils.datasets import load_rows
from cbd_trl.utils.formatting import parse_count
from tests.bridge.tokenizers_of_kinds import make_tokenizer
from tests.recipe.helpers import ARGS
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer

TRAINING = [
    *("--max_steps", "2", "--per_device_train_batch_size", "2", "--max_length", "16", "--report_to", "none"),
    *("--use_cpu", "--bf16", "false", "--gradient_checkpointing", "false", "--dataloader_pin_memory", "false"),
    *("--save_strategy", "no", "--disable_tqdm", "true"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A source with its tokenizer, and text in a file."""
    path = tmp_path_factory.mktemp("cli")
    tiny_model("llama", num_hidden_layers=6, tie_word_embeddings=True).save_pretrained(path / "source")
    tiny_tokenizer().save_pretrained(path / "source")
    lines = [" ".join(f"w{(5 * i + 3 * j) % 54}" for j in range(12)) for i in range(40)]
    (path / "rows.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (path / "rows.txt").write_text("\n\n".join(lines))
    return path


@pytest.fixture(scope="module")
def chain(folder):
    """A chain made by the command `build` from a recipe."""
    narrow = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
    recipe = {
        "source": str(folder / "source"),
        "data": str(folder / "rows.jsonl"),
        "anchors": [
            {"shape": {"num_hidden_layers": 4}, "args": {"learning_rate": 3.0e-4, "warmup_steps": 1}},
            {"shape": narrow},
        ],
        "output_dir": str(folder / "elsewhere"),
        "calibration_tokens": 64,
        "args": {**ARGS, "learning_rate": 1.0e-3, "max_steps": 1},
    }
    (folder / "build.yaml").write_text(json.dumps(recipe))
    flags = ["--set", "args.max_steps=2", "--set", f"output_dir={folder / 'chain'}"]
    assert main(["build", str(folder / "build.yaml"), *flags]) == 0
    assert not (folder / "elsewhere").exists()
    return folder / "chain"


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)
    assert main([]) == 2


OWN = {
    "demo": demo.COMMAND,
    "consolidate": consolidate.COMMAND,
    "init": init.COMMAND,
    "push": push.COMMAND,
    "report": report.COMMAND,
    "cache": cache.COMMAND,
    "generate": generate.COMMAND,
    "distill": train.DISTILL,
    "bridge": train.BRIDGE,
}
IN_A_PROCESS = """
import json, sys
from contextlib import redirect_stdout
from io import StringIO
from cbd_trl.cli.main import COMMANDS, main

shown = {}
for arguments in [["--help"], ["--version"], ["tarin"], *([name, "--help"] for name in COMMANDS)]:
    with redirect_stdout(StringIO()) as text:
        try:
            main(arguments)
        except SystemExit as stop:
            assert stop.code == 0
    shown[arguments[0]] = text.getvalue()
heavy = {"torch", "trl", "transformers", "datasets", "numpy"} & sys.modules.keys()
print(json.dumps([sorted(heavy), shown]))
"""


@pytest.fixture(scope="module")
def shown():
    """Help of every command in a process that has imported nothing else: the modules it imports, and the texts."""
    run = subprocess.run([sys.executable, "-c", IN_A_PROCESS], capture_output=True, text=True, check=True)
    heavy, texts = json.loads(run.stdout)
    assert heavy == []
    return texts


def test_help_imports_nothing_heavy_and_knows_every_command(shown):
    assert COMMANDS.keys() <= shown.keys()
    assert OWN.keys() == COMMANDS.keys() - {"build"}


@pytest.mark.parametrize("name", OWN)
def test_help_lists_the_options_of_the_command(name, shown):
    """All of its own, each as the parser knows it; those of TRL are behind --help-all."""
    listed = set(re.findall(r"^  (--[\w-]+)", shown[name], re.MULTILINE)) - {"--help-all", "--config"}
    fields = {field.name for kind in OWN[name].own for field in dataclasses.fields(kind)}
    assert {flag[2:].replace("-", "_") for flag in listed} == fields
    assert listed <= set(OWN[name]._parser().known_flags())
    assert all(f"  {argument} " in shown[name] for argument in OWN[name].positional)
    assert ("--help-all" in shown[name]) == (OWN[name].types is not None)


def test_the_options_of_a_config_are_listed_without_a_copy():
    """What DistillConfig and BridgeDistillConfig add to SFTConfig is what their help lists."""
    for config, command in ((DistillConfig, train.DISTILL), (BridgeDistillConfig, train.BRIDGE)):
        fields = {field.name for field in dataclasses.fields(config)}
        own = {field.name for kind in command.own for field in dataclasses.fields(kind)}
        assert own == fields - {field.name for field in dataclasses.fields(SFTConfig)}


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("build", ["--dry-run", "--shape-search", "--set", "--list-recipes"]),
        ("cache", ["--model_name_or_path", "--dataset_name", "--k", "--learning_rate"]),
        ("distill", ["--divergence {forward_kl,", "--kd_schedule {constant,", "--use_peft", "--learning_rate"]),
        ("bridge", ["--objective", "--divergence {forward_kl,", "--dataset_name"]),
        ("init", ["--num-parameters", "--operator {nested,"]),
        ("consolidate", ["--dataset_name", "--learning_rate", "--kd_weight"]),
    ],
)
def test_help_all_lists_every_flag(name, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help-all"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in flags)


def test_build_reads_a_recipe_and_set_wins(chain):
    built = Chain.from_pretrained(chain)
    assert [anchor.shape["num_hidden_layers"] for anchor in built.anchors] == [6, 4, 4]
    assert built.anchors[1].arguments["learning_rate"] == 3e-4
    assert built.anchors[2].arguments["learning_rate"] == 1e-3
    assert {anchor.arguments["max_steps"] for anchor in built.anchors[1:]} == {2}


@pytest.mark.parametrize("flags", [["--config", "flags.yaml"], ["--source", "x", "--anchors", "85M"], ["--recipe=x"]])
def test_build_without_a_recipe_shows_how_to_write_one(flags, capsys):
    assert main(["build", *flags]) == 2
    error = capsys.readouterr().err
    assert flags[0].partition("=")[0] in error
    # What it shows is a recipe.
    sketch = yaml.safe_load(re.search(r"\{.*\}\}", error)[0])
    assert not parse_recipe(sketch, "sketch").problems


def test_init_writes_a_normal_model_folder(chain, tmp_path, capsys):
    flags = ["--shape", '{"num_hidden_layers": 5}', "--operator", "slice", "--dtype", "bfloat16"]
    assert main(["init", str(chain), *flags, "--output", str(tmp_path / "model")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.num_hidden_layers == 5
    assert model.config.cbd_trl["operator"] == "slice"
    assert str(model.dtype) == "torch.bfloat16"
    AutoTokenizer.from_pretrained(tmp_path / "model")
    assert "operator slice" in capsys.readouterr().out


def test_init_by_size_with_calibration_text_and_yaml(chain, folder, tmp_path):
    anchors = Chain.from_pretrained(chain).anchors
    size = (anchors[1].num_parameters + anchors[2].num_parameters) / 2
    (tmp_path / "init.yaml").write_text(
        f"chain: {chain}\nnum_parameters: {size}\ntolerance: 0.3\nshape:\n  num_attention_heads: 4\n"
    )
    flags = ["--config", str(tmp_path / "init.yaml"), "--calibration-data", str(folder / "rows.txt")]
    assert main(["init", *flags, "--output", str(tmp_path / "model")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert abs(model.num_parameters() / size - 1) <= 0.3
    assert model.config.num_attention_heads == 4


def test_consolidate_writes_a_new_chain(chain, folder, tmp_path, capsys):
    flags = ["--dataset_name", str(folder / "rows.jsonl"), "--output_dir", str(tmp_path / "chain"), *TRAINING]
    assert main(["consolidate", str(chain), *flags, "--calibration_tokens", "64"]) == 0
    before, after = Chain.from_pretrained(chain), Chain.from_pretrained(tmp_path / "chain")
    (run,) = after.anchors[2].training["consolidation"]
    assert run["calibration_tokens"] == 64 and run["arguments"]["values"]["max_steps"] == 2
    assert f"The consolidated chain is in {tmp_path / 'chain'}" in capsys.readouterr().out
    assert [anchor.shape for anchor in after.anchors] == [anchor.shape for anchor in before.anchors]
    assert main(["consolidate", *flags]) == 2
    assert "The chain is missing: cbd-trl consolidate CHAIN" in capsys.readouterr().err


def test_distill_trains_a_lora_student(folder, tmp_path):
    source = str(folder / "source")
    flags = ["--model_name_or_path", source, "--teacher_model_name_or_path", source, "--use_peft", "--lora_r", "2"]
    flags += ["--dataset_name", str(folder / "rows.jsonl"), "--output_dir", str(tmp_path / "student"), *TRAINING]
    assert main(["distill", *flags]) == 0
    assert (tmp_path / "student" / "adapter_model.safetensors").is_file()


def test_bridge_trains_a_student_of_another_tokenizer(folder, tmp_path, capsys):
    teacher, tokenizer = tiny_model("gpt_neox", vocab_size=420, max_position_embeddings=128), make_tokenizer(size=420)
    own = tiny_model("llama", vocab_size=300, num_hidden_layers=2)
    for name, model, spoken in (("teacher", teacher, tokenizer), ("own", own, make_tokenizer(size=300))):
        model.save_pretrained(tmp_path / name)
        spoken.save_pretrained(tmp_path / name)
    flags = ["--model_name_or_path", str(tmp_path / "own"), "--dataset_name", str(folder / "rows.jsonl"), *TRAINING]
    flags += ["--output_dir", str(tmp_path / "student"), "--objective", "alm=1,uld=0.5"]
    assert main(["bridge", *flags, "--teacher_model_name_or_path", str(tmp_path / "teacher")]) == 0
    assert len(AutoTokenizer.from_pretrained(tmp_path / "student")) == 300
    assert main(["bridge", *flags, "--objective", "seqkd"]) == 0
    assert main(["bridge", *flags]) == 2
    assert "--teacher_model_name_or_path" in capsys.readouterr().err


def test_cache_writes_what_training_reads(folder, tmp_path, capsys):
    source, cache = str(folder / "source"), str(tmp_path / "cache")
    flags = ["--model_name_or_path", source, "--dataset_name", str(folder / "rows.jsonl"), "--output_dir", cache]
    flags += ["--k", "7", "--temperature", "2.0", *TRAINING]
    assert main(["cache", *flags]) == 0
    shown = capsys.readouterr().out
    written = TeacherCache.open(cache, verify=True)
    assert (written.settings.teacher, written.settings.k, written.settings.temperature) == ("source", 7, 2.0)
    assert re.search(rf"^{len(written)} rows, {written.manifest.tokens} tokens, \d+ bytes per token in ", shown)
    assert f"teacher_cache={cache!r}" in shown
    tokenizer = tiny_tokenizer()
    lines = [json.loads(line)["text"] for line in (folder / "rows.jsonl").read_text().splitlines()]
    written.check_rows(tokenizer(line + "</s>")["input_ids"][:16] for line in lines)
    assert main(["cache", *flags, "--k", "8"]) == 1
    assert "k is 7" in capsys.readouterr().err
    student = ["--model_name_or_path", source, "--teacher_cache", cache, "--output_dir", str(tmp_path / "student")]
    student += ["--dataset_name", str(folder / "rows.jsonl"), *TRAINING]
    assert main(["distill", *student, "--temperature", "2.0"]) == 0
    assert (tmp_path / "student" / "model.safetensors").is_file()
    assert main(["distill", *student]) == 1
    assert "Set temperature=2.0, or write a cache with --temperature 1.0" in capsys.readouterr().err


def test_generate_writes_what_a_student_is_trained_on(folder, tmp_path, capsys):
    source, file = str(folder / "source"), tmp_path / "corpus.jsonl"
    flags = ["--model_name_or_path", source, "--dataset_name", str(folder / "rows.jsonl"), "--output_file", str(file)]
    flags += ["--prompt_tokens", "4", "--max_new_tokens", "5", "--temperature", "0.9", "--seed", "3", "--use_cpu"]
    flags += ["--disable_tqdm"]
    assert main(["generate", *flags]) == 0
    written = file.read_bytes()
    rows = [json.loads(line) for line in written.splitlines()]
    texts = [json.loads(line)["text"] for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [" ".join(text.split()[:4]) for text in texts]
    cut = sum(row["finish_reason"] == "length" for row in rows)
    shown = capsys.readouterr().out
    assert f"40 rows in {file}, {cut} of them cut off after 5 tokens" in shown
    file.write_bytes(written[: len(written) // 2])
    assert main(["generate", *flags]) == 0
    assert file.read_bytes() == written
    assert main(["generate", *flags, "--dtype", "bfloat16"]) == 1
    assert "corpus.jsonl was generated in another way: teacher_fingerprint is" in capsys.readouterr().err
    student = [
        "--model_name_or_path",
        source,
        "--teacher_model_name_or_path",
        source,
        "--output_dir",
        str(tmp_path / "s"),
    ]
    assert main(["distill", *student, "--dataset_name", str(file), *TRAINING]) == 0


@pytest.mark.parametrize(("kind", "flag", "value"), [("sampled", "seed", 5), ("hidden", "hidden_dtype", "bfloat16")])
def test_cache_of_another_kind(folder, tmp_path, kind, flag, value):
    flags = ["--model_name_or_path", str(folder / "source"), "--dataset_name", str(folder / "rows.jsonl"), *TRAINING]
    flags += ["--kind", kind, f"--{flag}", str(value)]
    assert main(["cache", *flags, "--output_dir", str(tmp_path)]) == 0
    assert getattr(TeacherCache.open(tmp_path).settings, flag) == value


def test_cache_imports_log_probabilities(folder, tmp_path):
    entries = [None, {"7": {"logprob": -1.0}, "8": {"logprob": -2.0}}]
    (tmp_path / "vllm.jsonl").write_text(json.dumps({"prompt_token_ids": [7, 8], "prompt_logprobs": entries}))
    flags = ["--model_name_or_path", str(folder / "source"), "--logprobs", str(tmp_path / "vllm.jsonl"), "--k", "2"]
    assert main(["cache", *flags, "--output_dir", str(tmp_path / "cache"), *TRAINING]) == 0
    settings = TeacherCache.open(tmp_path / "cache").settings
    assert (settings.teacher, settings.vocabulary_rows, settings.k) == ("source", 64, 2)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["biuld"],
            2,
            r"no command 'biuld'. Did you mean 'build'\? There are: demo, build, consolidate, init, push",
        ),
        (["init"], 2, "The chain is missing: cbd-trl init CHAIN"),
        (["init", "chain"], 2, "--output is missing"),
        (["init", "chain", "--ouptut", "x"], 2, r"no flag '--ouptut'. Did you mean '--output'\?"),
        (["init", "chain", "--output", "x", "--operator", "best"], 2, "invalid choice: 'best'"),
        (["init", "chain", "--output", "x", "--alpha", "much"], 2, "argument --alpha: invalid"),
        (["init", "chain", "--output", "x", "--num-parameters", "many"], 1, "'many'.*number of parameters"),
        (["init", "no/such/chain", "--output", "x", "--num-parameters", "1M"], 1, "no folder no/such/chain"),
        (["build"], 2, "A recipe is missing: name a file, or one of demo, "),
        (["build", "no.yaml"], 1, "no recipe 'no.yaml'"),
        (
            ["distill", "--use_cpu"],
            2,
            "--model_name_or_path, --dataset_name are missing",
        ),
        (
            ["distill", "--use_cpu", "--model_name_or_path", "x", "--dataset_name", "y"],
            2,
            "name one with --teacher_model_name_or_path, --teacher_cache or --self_distillation",
        ),
        (["distill", "--use_cpu", "--temperature", "0"], 1, "temperature=0.0: it divides the logits"),
        (["cache", "--use_cpu"], 2, "--model_name_or_path is missing"),
        (["cache", "--use_cpu", "--model_name_or_path", "x"], 2, "--dataset_name is missing"),
        (["cache", "--use_cpu", "--kind", "all"], 2, "invalid choice: 'all'"),
        (
            ["cache", "--use_cpu", "--model_name_or_path", "x", "--logprobs", "y", "--kind", "sampled"],
            2,
            "--logprobs with --kind sampled --temperature 1.0: a file of log-probabilities makes a cache of kind",
        ),
        (["cache", "--use_cpu", "--model_name_or_path", "x", "--use_peft"], 2, "--use_peft shapes an adapter that is"),
        (["cache", "--use_cpu", "--model_name_or_path", "x", "--lora_r", "8"], 2, "--lora_r shapes an adapter"),
        (
            ["cache", "--use_cpu", "--model_name_or_path", "x", "--trust_remote_code", "true"],
            2,
            "--trust_remote_code would run code of the teacher's repository",
        ),
        (
            ["cache", "--use_cpu", "--model_name_or_path", "x", "--logprobs", "y", "--batch_size", "4"],
            2,
            "--batch_size is for running the teacher, and with --logprobs it is not run",
        ),
        (
            ["cache", "--use_cpu", "--model_name_or_path", "x", "--logprobs", "y", "--hidden_dtype", "float16"],
            2,
            "--hidden_dtype is for running the teacher",
        ),
        (["generate"], 2, "--model_name_or_path, --dataset_name, --output_file are missing"),
        (["generate", "--model_name_or_path", "x", "--dataset_name", "y"], 2, "--output_file is missing"),
        (
            ["generate", "--model_name_or_path", "x", "--dataset_name", "y", "--output_file", "z", "--lora_r", "8"],
            2,
            "--lora_r shapes an adapter that is trained, and a corpus is generated without training",
        ),
        (
            [
                "generate",
                "--model_name_or_path",
                "x",
                "--dataset_name",
                "y",
                "--output_file",
                "z",
                "--dataset_streaming",
            ],
            2,
            "--dataset_streaming: a run that goes on where it was interrupted needs rows by number",
        ),
        (["generate", "--temperature", "0"], 1, "temperature=0.0: it divides the logits"),
        (["generate", "--trust_remote_code", "true"], 2, "There is no flag '--trust_remote_code'"),
        (["demo", "--config", "no.yaml"], 2, "config file cannot be read"),
        (["demo", "--config"], 2, "--config needs the path"),
    ],
)
def test_errors_are_one_line_with_a_code(arguments, code, message, capsys):
    assert main(arguments) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]


# Before 5.2 datasets leaves a CSV file that it could not read open.
@pytest.mark.filterwarnings("ignore:Exception ignored in.*FileIO:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "b"\n',
            r"a\.jsonl cannot be read: JSON parse error.*one JSON object on each",
        ),
        (
            "a.txt",
            "café\n".encode("latin1"),
            r"a\.txt cannot be read: 'utf-8' codec.*Wanted text in UTF-8: convert it",
        ),
        ("a.csv", b"a,b\n1,2\n1,2,3,4\n", r"a\.csv cannot be read: Error tokenizing data.*ParserError"),
        (
            "a.parquet",
            b"text, and more of it",
            r"a\.parquet cannot be read: Parquet magic bytes not found.*Wanted",
        ),
        ("a.jsonl.gz", b"text", r"a\.jsonl\.gz cannot be read: Not a gzipped file.*Wanted"),
        ("a.jsonl", b"", r"a\.jsonl is empty: there are no rows to read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_cause(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_rows(str(tmp_path / name))


def test_a_folder_of_files_that_do_not_go_together_is_named_with_the_cause(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "data" / "b.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(ValueError, match=r"rows of .*data cannot be read: .*other.*every file in it to have the same"):
        load_rows(str(tmp_path / "data"))


@pytest.mark.parametrize(
    "command", [["report", "chain", "--data"], ["init", "chain", "--output", "x", "--calibration-data"]]
)
def test_the_commands_say_what_is_wrong_with_a_file_without_a_traceback(tmp_path, monkeypatch, capsys, command):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows.jsonl").write_text("no JSON\n")
    assert main([*command, str(tmp_path / "rows.jsonl")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(
        rf"^cbd-trl {command[0]}: error: The rows of .*rows\.jsonl cannot be read: JSON parse error", error
    )


@pytest.mark.parametrize("content", [b"output: [chain", b"output: \xe9\n", b"a: 1\n b: 2\n"])
def test_a_config_file_that_is_no_yaml_is_named(tmp_path, capsys, content):
    (tmp_path / "init.yaml").write_bytes(content)
    assert main(["init", "chain", "--config", str(tmp_path / "init.yaml")]) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(r"The config file .*init\.yaml is not YAML \(.*\)\. Wanted a line of `flag: value`", error)
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("138e6", 138e6),
        ("138M", 138e6),
        ("1.2b", 1.2e9),
        ("85_000", 85000),
        ("0.6", 0.6),
        (7, 7.0),
        ("1,200,000", 1.2e6),
    ],
)
def test_parse_count(text, count):
    assert parse_count(text) == pytest.approx(count)


def test_a_comma_for_a_point_is_no_number():
    with pytest.raises(ValueError, match=r"'1,2B' must be a number of parameters"):
        parse_count("1,2B")


def test_parse_shape():
    assert (
        parse_shape('{"num_hidden_layers": 20}') == {"num_hidden_layers": 20} == parse_shape({"num_hidden_layers": 20})
    )
    assert parse_shape(None) is None
    for value, reason in (("20", "must be an object"), ("{num_hidden_layers: 16}", "not JSON.*double quotes")):
        with pytest.raises(ValueError, match=f"--shape: .*{reason}"):
            parse_shape(value)


@pytest.mark.parametrize(("arguments", "code"), [(["push", "--bogus"], 2), (["init", "nowhere", "--dry-run"], 1)])
def test_a_launched_module_ends_with_the_code_of_the_command(arguments, code):
    done = subprocess.run([sys.executable, "-m", "cbd_trl.cli", *arguments], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
