"""Training arguments that would end a build midway are refused before it, each at its place."""

import re
from pathlib import Path
from typing import Any

import pytest

from cbd_trl.recipe import arguments as argument_checks
from cbd_trl.recipe.arguments import check_argument
from cbd_trl.recipe.check import Check, check_recipe
from cbd_trl.recipe.read import parse_recipe
from tests.recipe.helpers import ARGS, raw_recipe

NAN, INF = float("nan"), float("inf")
BAD = [
    ("learning_rate", -1.0, "-1.0 cannot be: a step of the optimiser must be finite and at least 0"),
    ("learning_rate", NAN, "nan cannot be: a step of the optimiser"),
    ("learning_rate", INF, "inf cannot be: a step of the optimiser"),
    ("per_device_train_batch_size", 0, "0 cannot be: it counts, so it must be at least 1. Leave it out"),
    ("gradient_accumulation_steps", 0, "0 cannot be: it counts, so it must be at least 1"),
    ("gradient_accumulation_steps", None, "it has no value. Give it one, or leave it out"),
    ("max_length", 0, "0 cannot be: a row needs a token and one to predict from it, so it must be at least 2"),
    ("max_length", -3, "-3 cannot be: a row needs a token"),
    ("max_steps", 0, "0 cannot be: it must be at least 1, or -1 to count in epochs"),
    ("num_train_epochs", NAN, "nan cannot be: it must be finite and above 0"),
    ("warmup_steps", -1, "-1 cannot be: it must be finite and at least 0"),
    ("weight_decay", -0.1, "-0.1 cannot be: it must be finite and at least 0"),
    ("max_grad_norm", NAN, "nan cannot be: it must be finite and at least 0"),
    ("neftune_noise_alpha", -1.0, "-1.0 cannot be: it must be finite and at least 0"),
    ("adam_beta1", 1.0, "1.0 cannot be: it is a share of a running mean, so it must be at least 0 and below 1"),
    ("adam_beta2", -0.5, "-0.5 cannot be: it is a share of a running mean"),
    ("adam_epsilon", -1e-8, "-1e-08 cannot be: it must be finite and at least 0"),
    ("logging_steps", 0, "0 cannot be: it is a number of steps, or a share of them"),
    ("save_steps", -5, "-5 cannot be: it is a number of steps, or a share of them"),
    ("seed", -1, "-1 cannot be: a seed must be at least 0 and below 4294967296"),
    ("data_seed", 2**32, "4294967296 cannot be: a seed must be at least 0"),
    ("dataloader_num_workers", -1, "-1 cannot be: it must be finite and at least 0"),
    ("dataloader_prefetch_factor", 0, "0 cannot be: it counts, so it must be at least 1"),
    ("dataset_num_proc", 0, "0 cannot be: it counts, so it must be at least 1"),
    ("report_to", "wandbb", "transformers reports to nothing of the name 'wandbb'. Did you mean 'wandb'? There are: "),
    ("report_to", ["none", "all"], "transformers reports to nothing of the name 'none'."),
    ("report_to", "neptune", "what neptune needs is not installed here, so the training would end before its first"),
    (
        "optim",
        "adamw_torhc",
        "there is no optimiser 'adamw_torhc'. Did you mean 'adamw_torch'? There are: adamw_torch",
    ),
    ("optim", "galore_adamw", "the optimiser galore_adamw cannot be made here: You need to install `galore_torch`"),
    ("optim", "grokadamw", "the optimiser grokadamw cannot be made here: Please install grokadamw"),
    ("dataset_text_field", "body", "'body' is no column of what is trained on: a recipe brings all data into the for"),
    ("model_init_kwargs", [1], "[1] is no mapping of options that the source is loaded with. Write one: {"),
    ("model_init_kwargs", "bfloat16", "'bfloat16' is no mapping of options that the source is loaded with"),
    ("model_init_kwargs", "{dtype", "'{dtype' is no JSON (Expecting property name"),
    ("model_init_kwargs", {"dtype": "bfloat61"}, "dtype: 'bfloat61' is no dtype that weights can be trained in."),
    ("model_init_kwargs", {"dtype": "nn"}, "dtype: 'nn' is no dtype that weights can be trained in."),
    ("model_init_kwargs", {"torch_dtype": "int8"}, "torch_dtype: 'int8' is no dtype that weights can be trained in."),
    ("model_init_kwargs", {"dtype": 16}, "dtype: 16 is no dtype that weights can be trained in. Write float32, bfloa"),
    ("push_to_hub", True, "True cannot be: the checkpoints of every anchor would be pushed to the root of one"),
    ("save_only_model", True, "True cannot be: a build that is interrupted goes on from its last checkpoint"),
    ("deepspeed", "nope.json", "there is no file nope.json, which would hold the settings of DeepSpeed as JSON."),
]


def _args_problems(place: str, args: dict[str, Any]) -> tuple[str, ...]:
    folder = Path("folder")
    changes: dict[str, Any] = {
        "args": {"args": args},
        "anchors[1].args": {"anchors": [0.5, {"ratio": 0.5, "args": args}]},
        "bridge.args": {"bridge": {"model": "m", "args": args}},
    }
    return parse_recipe(raw_recipe(folder, **changes[place]), "some").problems


@pytest.mark.parametrize("place", ["args", "anchors[1].args", "bridge.args"])
@pytest.mark.parametrize(("name", "value", "said"), BAD)
def test_a_bad_value_is_refused_where_it_stands(
    monkeypatch: pytest.MonkeyPatch, place: str, name: str, value: Any, said: str
) -> None:
    monkeypatch.setattr(argument_checks, "get_available_reporting_integrations", lambda: ["tensorboard"])
    [problem] = _args_problems(place, {name: value})
    assert problem.startswith(f"{place}.{name}: {said}"), problem


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 1e-3),
        ("max_length", None),
        ("max_steps", -1),
        ("save_steps", 0.1),
        ("report_to", None),
        ("report_to", "all"),
        ("report_to", ["none"]),
        ("report_to", ["tensorboard"]),
        ("optim", "adamw_torch_fused"),
        ("optim", "sgd"),
        ("dataset_text_field", "text"),
        ("model_init_kwargs", {"dtype": "bfloat16", "attn_implementation": "eager"}),
        ("model_init_kwargs", '{"dtype": "auto"}'),
        ("model_init_kwargs", {"dtype": {"text_config": "float16"}}),
        ("deepspeed", __file__),
        ("deepspeed", {"zero_optimization": {"stage": 2}}),
        ("temperature", -1.0),  # DistillConfig's own to refuse
    ],
)
def test_a_good_value_is_not(monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    monkeypatch.setattr(argument_checks, "get_available_reporting_integrations", lambda: ["tensorboard"])
    check_argument(name, value)


def test_an_integration_without_a_key_is_installed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(argument_checks, "get_available_reporting_integrations", lambda: [])
    with pytest.raises(
        ValueError, match=r"comet_ml needs is not installed here.* Install it \(comet_ml\), or write none"
    ):
        check_argument("report_to", "comet_ml")
    monkeypatch.setattr(argument_checks, "find_spec", lambda name: name == "comet_ml" or None)
    check_argument("report_to", "comet_ml")


def test_an_optimiser_that_wants_the_model_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def wants_the_model(args: Any) -> None:
        raise ValueError("You need to pass a `model` in order to correctly initialize a LOMO optimizer.")

    monkeypatch.setattr("transformers.Trainer.get_optimizer_cls_and_kwargs", wants_the_model)
    check_argument("optim", "lomo")


def test_bad_arguments_are_the_only_problems_of_a_recipe(inputs: Path, tmp_path: Path) -> None:
    args = {**ARGS, "max_length": 0, "gradient_accumulation_steps": 0, "deepspeed": "nope.json"}
    anchors = [{"shape": {"num_hidden_layers": 4}, "args": {"learning_rate": NAN, "per_device_train_batch_size": 0}}]
    raw = raw_recipe(inputs, output_dir=str(tmp_path / "chain"), args=args, anchors=anchors)
    places = [problem.partition(":")[0] for problem in check_recipe(parse_recipe(raw, "some")).problems]
    assert places == [
        "anchors[0].args.learning_rate",
        "anchors[0].args.per_device_train_batch_size",
        "args.max_length",
        "args.gradient_accumulation_steps",
        "args.deepspeed",
    ]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("size"), "args: KeyError: 'size'"),
        (ZeroDivisionError("division by zero"), "args: ZeroDivisionError: division by zero"),
        (AssertionError(), "args: AssertionError"),
        (ImportError("no\n such  package"), "args: no such package"),
        (ValueError("args.x: is wrong"), "args.x: is wrong"),
    ],
)
def test_whatever_a_check_raises_is_a_problem(error: Exception, said: str) -> None:
    def work() -> None:
        raise error

    check = Check(parse_recipe({}, "some"))
    assert check.attempt("args", work) is None
    assert check.problems == [said]


@pytest.mark.parametrize("inside", ["", "/chain"])
def test_an_output_dir_that_is_a_file(inputs: Path, tmp_path: Path, inside: str) -> None:
    file = tmp_path / "chain.txt"
    file.write_text("words")
    raw = raw_recipe(inputs, output_dir=f"{file}{inside}")
    [problem] = check_recipe(parse_recipe(raw, "some")).problems
    assert re.match(rf"output_dir: {file} is a file, so the chain cannot be written to {file}{inside}\. Name", problem)
    assert file.read_text() == "words"
