"""Every field of a `BridgeDistillConfig` changes the result, or is refused with the reason."""

import math
from typing import Any

import pytest
from trl import TrlParser

from cbd_trl import BridgeDistillConfig, BridgeDistillTrainer, DistillConfig, DistillTrainer
from cbd_trl.bridge.objectives.registry import OBJECTIVES, parse_objective
from tests.trainers.bridge_runs import make_bridge, make_bridge_config, student, teacher
from tests.trainers.test_distill_config import relative_change
from tests.training import make_config, one_step

# What one step is run with, and the change that must be seen in its gradient.
CHANGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"objective": "uld"}),
    ({}, {"objective": "shared"}),
    ({}, {"objective": "dskd-cma"}),
    ({}, {"objective": "prefix"}),
    ({"objective": "prefix"}, {"temperature": 2.0}),
    ({"objective": "prefix"}, {"divergence": "jsd"}),
    ({"objective": "dskd-cma"}, {"temperature": 1.0}),
    ({}, {"objective": "alm=1,uld=0.5"}),
    ({"objective": {"alm": 1.0, "uld": 0.5}}, {"objective": {"alm": 1.0, "uld": 2.0}}),
    ({}, {"divergence": "reverse_kl"}),
    ({"divergence": "jsd"}, {"beta": 0.2}),
    ({"divergence": "skew_kl"}, {"skew": 0.4}),
    ({"divergence": "adaptive_kl", "objective": "shared"}, {"head_share": 0.9}),
    ({}, {"temperature": 1.0}),
    ({"objective": "uld"}, {"temperature": 3.0}),
    ({"objective": "uld"}, {"top_k": 3}),
    ({}, {"kd_weight": 3.0}),
    ({}, {"ce_weight": 0.0}),
    ({}, {"hidden_weight": 1.0, "hidden_projector": True}),
    ({"hidden_weight": 1.0, "hidden_projector": True}, {"hidden_loss": "mse"}),
    ({"max_steps": 2}, {"kd_schedule": "linear"}),
]
OWN = set(BridgeDistillConfig.__annotations__)


@pytest.mark.parametrize(("before", "change"), CHANGES, ids=lambda fields: str(fields))
def test_every_field_changes_the_gradient(before: dict, change: dict) -> None:
    _, old = one_step(make_bridge(**before))
    _, new = one_step(make_bridge(**{**before, **change}))
    assert relative_change(new, old) > 1e-3


def test_no_field_is_forgotten() -> None:
    assert {name for _, change in CHANGES for name in change} >= OWN
    for name in OWN:
        field = BridgeDistillConfig.__dataclass_fields__[name]
        assert f"\n        {name}: " in (BridgeDistillConfig.__doc__ or ""), name
        assert field.metadata["help"].endswith("."), name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": "aml"}, "Unknown objective 'aml': there are alm, .* Did you mean 'alm'"),
        ({"objective": "alm,alm"}, "names 'alm' twice"),
        ({"objective": "alm=much"}, "'alm' by 'much'"),
        ({"objective": "alm=1,uld=-1"}, "'uld' has weight -1.0 in a mixture"),
        ({"objective": {"alm": math.inf}}, "'alm' has weight inf"),
        ({"objective": ""}, "Unknown objective ''"),
        ({"objective": {}}, "alm, uld"),
        ({"objective": "alm,dskd-cma"}, "objective='alm,dskd-cma': .* Use it alone, and kd_weight"),
        ({"objective": "alm,prefix"}, "objective='alm,prefix': .* Use it alone, and kd_weight"),
        ({"objective": "dskd-cma=2"}, "objective='dskd-cma=2': .* Use it alone, and kd_weight"),
        ({"temperature": 0.0}, "temperature=0.0: it divides the logits"),
        ({"divergence": "kl"}, "Unknown divergence 'kl'"),
        (
            {"divergence": "jsd", "objective": "uld"},
            "divergence='jsd' is an option of alm and shared and dskd-cma and prefix",
        ),
        ({"top_k": 3}, "top_k=3 is an option of uld and shared, and objective='alm': it would be ignored"),
        ({"top_k": 0, "objective": "uld"}, "top_k=0: it is a number of tokens"),
        ({"beta": 0.2}, "beta=0.2 is an option of jsd, which divergence=None does not have"),
        ({"teacher_cache": "folder"}, "teacher_cache='folder' has no meaning across vocabularies: a cache holds"),
        ({"self_distillation": True}, "self_distillation=True has no meaning .* there is DistillTrainer"),
        ({"teacher_weights": [1.0]}, r"teacher_weights=\[1.0\] has no meaning"),
        ({"swap_probability": 0.5}, "swap_probability=0.5 has no meaning .* one chain"),
        ({"hidden_weight": 1.0}, "hidden_weight=1.0 compares .* hidden_projector=True, or set hidden_weight=0"),
        ({"kd_weight": -1.0}, "kd_weight=-1.0: a weight of the loss"),
    ],
    ids=str,
)
def test_a_bad_value_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_bridge_config(**fields)


def test_mixtures_are_read_in_every_form() -> None:
    assert parse_objective("alm") == {"alm": 1.0}
    assert parse_objective(" alm = 1, uld=0.5") == parse_objective({"alm": 1, "uld": "0.5"}) == {"alm": 1, "uld": 0.5}
    assert all(parse_objective(name) == {name: 1.0} for name in OBJECTIVES)
    assert BridgeDistillConfig("unused", bf16=False, use_cpu=True).objectives == {"prefix": 1.0}


@pytest.mark.parametrize("objective", ["alm=1,uld=0.5", '{"alm": 1, "uld": 0.5}'])
def test_the_command_line_sets_a_mixture(objective: str) -> None:
    words = ["--output_dir", "x", "--bf16", "false", "--use_cpu", "true", "--objective", objective]
    (args,) = TrlParser(BridgeDistillConfig).parse_args_and_config([*words, "--temperature", "5"])
    assert args.objectives == {"alm": 1.0, "uld": 0.5} and args.temperature == 5.0 and args.divergence is None


def test_the_config_is_of_the_trainer() -> None:
    with pytest.raises(TypeError, match="args is a DistillConfig: BridgeDistillTrainer needs a BridgeDistillConfig"):
        BridgeDistillTrainer(student(), teacher(), make_config())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="args is a BridgeDistillConfig: DistillTrainer needs a DistillConfig"):
        DistillTrainer(student(), teacher(), make_bridge_config())
    assert make_bridge_config(temperature=5.0).kd_text == "alm across vocabularies (temperature 5.0)"
    assert DistillConfig("x", bf16=False, use_cpu=True).kd_text == "forward_kl (temperature 1)"
