"""Training arguments that would end a build midway are refused before it, each at its place."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cbd_trl import DistillConfig
from cbd_trl.recipe import arguments as argument_checks
from cbd_trl.recipe.arguments import check_argument
from cbd_trl.recipe.check import Check, check_recipe
from cbd_trl.recipe.configs import chain_args
from cbd_trl.recipe.schema import parse_recipe
from tests.recipe.helpers import ARGS, raw_recipe

NAN, INF = float("nan"), float("inf")
# Values that a config takes and a training would fail on.
BAD = [
    *(("learning_rate", value) for value in (-1.0, NAN, INF)),
    ("per_device_train_batch_size", 0),
    ("gradient_accumulation_steps", 0),
    ("gradient_accumulation_steps", None),
    ("max_length", 0),
    ("max_length", -3),
    ("max_steps", 0),
    ("num_train_epochs", NAN),
    ("weight_decay", -0.1),
    ("warmup_steps", NAN),
    ("logging_steps", -1.0),
    ("logging_steps", NAN),
    ("max_grad_norm", NAN),
    ("neftune_noise_alpha", -1.0),
    ("adam_beta1", 1.0),
    ("adam_beta2", -0.5),
    ("adam_epsilon", -1e-8),
    ("save_steps", -5),
    ("seed", -1),
    ("data_seed", 2**32),
    ("dataloader_num_workers", -1),
    ("dataloader_prefetch_factor", 0),
    ("dataset_num_proc", 0),
    ("report_to", "wandbb"),
    ("report_to", ["none", "all"]),
    ("report_to", "neptune"),
    ("optim", "galore_adamw"),
    ("optim", "grokadamw"),
    ("dataset_text_field", "body"),
    *(("model_init_kwargs", value) for value in ([1], "bfloat16", {"dtype": "bfloat61"}, {"dtype": "nn"})),
    *(("model_init_kwargs", value) for value in ({"torch_dtype": "int8"}, {"dtype": 16}, '{"dtype": "int8"}')),
    ("push_to_hub", True),
    ("save_only_model", True),
]
# Values that a config refuses: nothing checks them once more.
REFUSED_BY_THE_CONFIG = [
    ("optim", "adamw_torhc"),
    ("model_init_kwargs", "{dtype"),
    ("deepspeed", "nope.json"),
    ("divergence", "klx"),
    ("eval_strategy", "steps"),
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
@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_refused_at_its_place(
    monkeypatch: pytest.MonkeyPatch, place: str, name: str, value: Any
) -> None:
    monkeypatch.setattr(argument_checks, "get_available_reporting_integrations", lambda: ["tensorboard"])
    [problem] = _args_problems(place, {name: value})
    assert problem.startswith(f"{place}.{name}: "), problem
    shown = value if isinstance(value, str) and not value.startswith("{") else None
    assert shown is None or shown in problem


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_config_takes_a_bad_value(name: str, value: Any) -> None:
    """What a config refuses by itself is no longer to be checked here."""
    DistillConfig("unused", **{**ARGS, "dataloader_num_workers": 1, name: value})


@pytest.mark.parametrize(("name", "value"), REFUSED_BY_THE_CONFIG)
def test_what_a_config_refuses_is_a_problem_of_that_argument(name: str, value: Any) -> None:
    recipe = parse_recipe(raw_recipe(Path("folder"), args={**ARGS, name: value}), "some")
    assert recipe.problems == ()
    check = Check(recipe)
    assert check.make_config("args", partial(chain_args, recipe), recipe.args) is None
    [problem] = check.problems
    assert problem.startswith(f"args.{name}: "), problem


def test_two_arguments_that_contradict_each_other_are_a_problem_of_all() -> None:
    recipe = parse_recipe(raw_recipe(Path("folder"), args={"kd_weight": -1.0, "divergence": "klx"}), "some")
    check = Check(recipe)
    check.make_config("args", partial(chain_args, recipe), recipe.args)
    assert [problem.partition(":")[0] for problem in check.problems] == ["args"]


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
        ("temperature", -1.0),  # DistillConfig's own to refuse
    ],
)
def test_a_good_value_is_not(monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    monkeypatch.setattr(argument_checks, "get_available_reporting_integrations", lambda: ["tensorboard"])
    assert _args_problems("args", {name: value}) == ()


def test_an_integration_without_a_key_is_installed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(argument_checks, "get_available_reporting_integrations", lambda: [])
    with pytest.raises(
        ValueError, match=r"comet_ml needs is not installed here.* Install it \(comet_ml\), or write none"
    ):
        check_argument("report_to", "comet_ml")
    monkeypatch.setattr(argument_checks, "find_spec", lambda name: name == "comet_ml" or None)
    check_argument("report_to", "comet_ml")


def test_an_optimizer_that_wants_the_model_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def wants_the_model(args: Any) -> None:
        raise ValueError("You need to pass a `model` in order to correctly initialize a LOMO optimizer.")

    monkeypatch.setattr("transformers.Trainer.get_optimizer_cls_and_kwargs", wants_the_model)
    check_argument("optim", "lomo")


def test_bad_arguments_are_the_only_problems_of_a_recipe(inputs: Path, tmp_path: Path) -> None:
    args = {**ARGS, "max_length": 0, "gradient_accumulation_steps": 0, "optim": "adamw_torhc"}
    anchors = [{"shape": {"num_hidden_layers": 4}, "args": {"learning_rate": NAN, "per_device_train_batch_size": 0}}]
    raw = raw_recipe(inputs, output_dir=str(tmp_path / "chain"), args=args, anchors=anchors)
    places = [problem.partition(":")[0] for problem in check_recipe(parse_recipe(raw, "some")).problems]
    assert places == [
        "anchors[0].args.per_device_train_batch_size",
        "anchors[0].args.learning_rate",
        "args.gradient_accumulation_steps",
        "args.max_length",
        "args.optim",
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


def test_an_unknown_key_without_a_value_is_a_problem_too() -> None:
    problems = parse_recipe({**raw_recipe(Path("folder")), "evalution": None}, "some").problems
    assert len(problems) == 1 and "evalution" in problems[0] and "evaluation" in problems[0]
