import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor, nn
from trl import SFTConfig, TrlParser

from cbd_trl import DistillTrainer
from cbd_trl.architectures.backbone import Head
from cbd_trl.losses.divergence_table import DIVERGENCES, OPTIONS, Option
from cbd_trl.trainers.checks import check_run
from cbd_trl.trainers.distill_config import DistillConfig
from tests.tiny import tiny_model
from tests.training import LENGTHS, assert_same_gradient, make_config, make_trainer, one_step

WITH_OPTION = {name: row.option for name, row in DIVERGENCES.items() if row.option is not None}


def _far_bound(option: Option) -> float:
    return max(option.low, option.high, key=lambda bound: abs(bound - option.default))


OWN = set(DistillConfig.__dataclass_fields__) - set(SFTConfig.__dataclass_fields__)
# What one step is run with, and the change that must be seen in its gradient.
CHANGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"kd_weight": 2.0}),
    ({}, {"ce_weight": 0.0}),
    ({}, {"hidden_weight": 1.0}),
    ({}, {"swap_probability": 1.0}),
    ({}, {"temperature": 2.0}),
    ({}, {"top_k": 3}),
    # The default is turned towards the bound that is farther away.
    *[
        ({"divergence": name}, {option.name: 0.1 * option.default + 0.9 * _far_bound(option)})
        for name, option in WITH_OPTION.items()
    ],
    ({"hidden_weight": 1.0}, {"hidden_loss": "mse"}),
    ({"hidden_weight": 1.0}, {"hidden_projector": True}),
    *[
        ({"max_steps": 2, "hidden_weight": 1.0, **before}, change)
        for term in ("kd", "ce", "hidden")
        for before, change in (
            ({}, {f"{term}_schedule": "linear"}),
            ({f"{term}_schedule": "linear"}, {f"{term}_weight_end": 3.0}),
        )
    ],
]
# Fields that say where the teacher comes from or how much memory is used: their own tests are named.
ELSEWHERE = {
    "teacher_model_name_or_path": "test_distill_trainer.py",
    "teacher_model_init_kwargs": "test_distill_trainer.py",
    "teacher_model_revision": "test_local.py",
    "teacher_weights": "test_teachers.py",
    "teacher_cache": "test_cached_teacher.py",
    "teacher_offload": "test_teachers.py",
    "self_distillation": "test_teachers.py",
    "divergence": "below",
    "loss_chunk_size": "below",
}


def relative_change(after: dict[str, Tensor], before: dict[str, Tensor]) -> float:
    """Of the gradient of those parameters that have one in both runs."""
    names = before.keys() & after.keys()
    assert names
    gap = sum((after[name] - before[name]).square().sum().item() for name in names)
    return (gap / sum(before[name].square().sum().item() for name in names)) ** 0.5


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kd_weight", -1.0, "kd_weight=-1.0: a weight of the loss must be finite and at least 0"),
        ("ce_weight", float("nan"), "ce_weight=nan"),
        ("hidden_weight", float("inf"), "hidden_weight=inf"),
        ("kd_weight_end", -1.0, "kd_weight_end=-1.0: a weight of the loss must be finite"),
        ("ce_weight_end", float("nan"), "ce_weight_end=nan"),
        ("hidden_weight_end", float("inf"), "hidden_weight_end=inf"),
        ("kd_schedule", "cosin", "Unknown schedule 'cosin': there are constant, .* Did you mean 'cosine'"),
        ("ce_schedule", "step", "Unknown schedule 'step'"),
        ("hidden_schedule", "exponential", "Unknown schedule 'exponential'"),
        ("temperature", 0.0, "temperature=0.0: it divides the logits"),
        ("temperature", float("inf"), "temperature=inf: it divides the logits"),
        ("beta", 1.5, "beta=1.5 must be at least 0 and at most 1"),
        ("beta", float("nan"), "beta=nan"),
        ("skew", 1.0, "skew=1.0 must be at least 0 and below 1"),
        ("skew", -0.1, "skew=-0.1"),
        ("head_share", 0.0, "head_share=0.0 must be above 0 and below 1"),
        ("head_share", 1.0, "head_share=1.0"),
        ("top_k", 0, "top_k=0: it is a number of tokens, .* Leave it out to compare every token"),
        ("top_k", 2.5, "top_k=2.5: it is a number of tokens, so it must be a whole number of at least 1"),
        ("loss_chunk_size", 0, "loss_chunk_size=0: .* Leave it out to have it chosen"),
        ("hidden_loss", "cosin", "Unknown hidden loss 'cosin': there are cosine, mse. Did you mean 'cosine'"),
        ("swap_probability", -0.1, "swap_probability=-0.1: .* must lie between 0 and 1"),
        ("divergence", "kl", "Unknown divergence 'kl': there are forward_kl, reverse_kl, jsd"),
        ("divergence", "foward_kl", "Did you mean 'forward_kl'"),
        ("teacher_weights", [], r"teacher_weights=\[\]: each teacher needs a finite weight above 0"),
        ("teacher_weights", [1.0, 0.0], r"teacher_weights=\[1.0, 0.0\]: .* Leave out a teacher"),
        ("teacher_weights", [1.0, float("nan")], "each teacher needs a finite weight above 0"),
        ("loss_type", "dft", "loss_type='dft' changes the loss of SFT"),
        ("label_smoothing_factor", 0.1, "label_smoothing_factor=0.1 changes the loss of SFT"),
    ],
)
def test_a_bad_value_is_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**{field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kd_weight": 0.0, "ce_weight": 0.0}, "nothing is left to minimize"),
        ({"kd_weight_end": 1.0}, "kd_weight_end=1.0 with kd_schedule='constant'.* would be ignored"),
        ({"ce_weight_end": 0.0}, "ce_weight_end=0.0 with ce_schedule='constant'"),
        ({"hidden_weight": 1.0, "hidden_weight_end": 0.5}, "hidden_weight_end=0.5 with hidden_schedule='constant'"),
        ({"kd_weight": 0.0, "kd_schedule": "linear"}, "goes from kd_weight=0 to kd_weight_end=0: .* ignored"),
        ({"hidden_weight": 0.0, "hidden_schedule": "cosine"}, "hidden_schedule='cosine' goes from hidden_weight=0"),
        ({"beta": 1.0}, "beta=1.0 is an option of jsd, which divergence='forward_kl' does not have"),
        ({"divergence": "jsd", "skew": 0.2}, "skew=0.2 is an option of skew_kl and skew_reverse_kl"),
        ({"divergence": "skew_kl", "head_share": 0.4}, "head_share=0.4 is an option of adaptive_kl.* Set divergence"),
        (
            {"ce_schedule": "linear", "metric_for_best_model": "eval_loss"},
            "metric_for_best_model='eval_loss' with ce_schedule: the loss is weighted differently",
        ),
        ({"hidden_projector": True}, "hidden_projector=True, but the hidden-state term has no weight"),
        (
            {"hidden_projector": True, "hidden_weight": 1.0, "swap_probability": 0.5},
            "hidden_projector=True with swap_probability=0.5",
        ),
        ({"teacher_cache": "c", "self_distillation": True}, "teacher_cache and self_distillation each name a teacher"),
        (
            {"teacher_cache": "c", "teacher_model_name_or_path": "t"},
            "teacher_model_name_or_path and teacher_cache each name a teacher",
        ),
        (
            {"teacher_cache": "c", "teacher_model_init_kwargs": {"dtype": "float32"}},
            "teacher_model_init_kwargs is about a teacher that is loaded, but with teacher_cache none is",
        ),
        ({"teacher_cache": "c", "teacher_model_revision": "v2"}, "teacher_model_revision is about a teacher"),
        ({"self_distillation": True, "teacher_offload": True}, "teacher_offload .* but with self_distillation"),
        ({"self_distillation": True, "teacher_weights": [1.0]}, "teacher_weights .* but with self_distillation"),
        ({"self_distillation": True, "swap_probability": 0.5}, "swap_probability=0.5 runs the layers of a teacher"),
        ({"teacher_cache": "c", "swap_probability": 0.5}, "with teacher_cache there are none to run"),
        ({"teacher_cache": "c", "hidden_weight": 1.0}, "hidden_weight compares the layers of a teacher, which a"),
    ],
    ids=str,
)
def test_options_that_contradict_each_other_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**fields)


@pytest.mark.parametrize("field", [{"hidden_schedule": "linear"}, {"hidden_loss": "mse"}], ids=str)
def test_shaping_a_hidden_term_that_is_off_is_refused(field: dict) -> None:
    make_config(**field)  # build_chain sets the weight that is missing
    with pytest.raises(
        ValueError, match=r"shapes the hidden-state term, which has no weight.* Set hidden_weight above"
    ):
        make_trainer(**field)


def test_reentrant_checkpointing_of_hybrids_is_refused() -> None:
    with pytest.raises(ValueError, match="Leave use_reentrant unset"):
        make_trainer(swap_probability=0.5, gradient_checkpointing_kwargs={"use_reentrant": True})


def _run(**changes: Any) -> Any:
    # What a trainer has after its initialization, on machines that these tests do not have.
    parallelism = SimpleNamespace(cp_enabled=False, sp_enabled=False)
    for name in ("cp_enabled", "sp_enabled"):
        setattr(parallelism, name, changes.pop(name, False))
    args = SimpleNamespace(**{name: changes.pop(name, None) for name in ("teacher_offload", "swap_probability")})
    state = {"aux_loss_enabled": False, "model": nn.Module(), "is_fsdp_enabled": False, "is_deepspeed_enabled": False}
    accelerator = SimpleNamespace(parallelism_config=parallelism)
    return SimpleNamespace(**{**state, "args": args, "accelerator": accelerator, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cp_enabled": True}, "Context and sequence parallelism split a row"),
        ({"sp_enabled": True}, "Set cp_size and sp_size to 1"),
        ({"is_fsdp_enabled": True, "teacher_offload": True}, "teacher_offload=True .* FSDP and DeepSpeed shard"),
        ({"is_deepspeed_enabled": True, "teacher_offload": True}, "Leave teacher_offload out"),
        ({"is_fsdp_enabled": True, "swap_probability": 0.5}, "swap_probability=0.5 runs the teacher's layers inside"),
        ({"is_deepspeed_enabled": True, "swap_probability": 0.5}, "Set swap_probability=0, or train with DDP"),
    ],
    ids=str,
)
def test_what_parallel_training_cannot_do_is_refused(changes: dict, message: str) -> None:
    check_run(_run())
    with pytest.raises(ValueError, match=message):
        check_run(_run(**changes))


@functools.cache
def _gradient_of(*fields: tuple[str, Any]) -> dict[str, Tensor]:
    return one_step(make_trainer(**dict(fields)))[1]


@pytest.mark.parametrize(("before", "change"), CHANGES, ids=lambda fields: str(fields))
def test_every_field_changes_the_gradient(before: dict, change: dict) -> None:
    old = _gradient_of(*before.items())
    _, new = one_step(make_trainer(**before, **change))
    assert relative_change(new, old) > 1e-3


def test_no_field_is_forgotten() -> None:
    # The shapes of schedules and the names of divergences have tests of their own.
    turned = {field for _, change in CHANGES for field in change}
    assert turned | set(ELSEWHERE) == OWN


def test_every_divergence_has_a_gradient_of_its_own() -> None:
    grads = {name: one_step(make_trainer(divergence=name, ce_weight=0.0))[1] for name in DIVERGENCES}
    for one in grads:
        for other in grads:
            assert one == other or relative_change(grads[one], grads[other]) > 1e-3, (one, other)


def test_linear_and_cosine_differ_between_the_ends() -> None:
    runs = [one_step(make_trainer(max_steps=3, kd_schedule=shape))[1] for shape in ("linear", "cosine")]
    assert relative_change(*runs) > 1e-3


def test_the_chunk_bounds_the_logits_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens: list[int] = []
    project = Head.project

    def watched(self: Head, hidden_ND: Tensor, *out: Tensor) -> Tensor:
        tokens.append(len(hidden_ND))
        return project(self, hidden_ND, *out)

    def run(**fields: Any) -> DistillTrainer:
        tied = tiny_model("llama", seed=1, num_hidden_layers=2, tie_word_embeddings=True)
        return make_trainer(student=tied, hidden_weight=1.0, **fields)

    whole_logs, whole = one_step(run())
    trainer = run(loss_chunk_size=5)
    monkeypatch.setattr(Head, "project", watched)
    logs, grads = one_step(trainer)
    assert max(tokens) == 5 and sum(tokens) == 2 * sum(LENGTHS)
    assert_same_gradient(grads, whole)
    assert logs["loss"] == pytest.approx(whole_logs["loss"], rel=1e-5)


def test_the_command_line_sets_every_field() -> None:
    values: dict[str, Any] = {
        "teacher_model_name_or_path": "t",
        "teacher_model_init_kwargs": '{"dtype":"float32"}',
        "teacher_model_revision": "r",
        "teacher_weights": [1.0, 3.0],
        "teacher_offload": True,
        "kd_weight": 2.0,
        "kd_schedule": "linear",
        "kd_weight_end": 1.0,
        "divergence": "jsd",
        "beta": 0.1,
        "temperature": 3.0,
        "top_k": 7,
        "ce_weight": 0.0,
        "ce_schedule": "cosine",
        "ce_weight_end": 0.25,
        "hidden_weight": 1.0,
        "hidden_schedule": "linear",
        "hidden_weight_end": 0.5,
        "hidden_loss": "mse",
        "swap_probability": 0.5,
        "loss_chunk_size": 9,
    }
    # These contradict some of the others.
    further: list[dict[str, Any]] = [
        {"teacher_cache": "folder"},
        {"self_distillation": True},
        *[{"divergence": name, option.name: option.default} for name, option in WITH_OPTION.items()],
        {"hidden_projector": True, "hidden_weight": 1.0},
    ]
    assert {name for line in (values, *further) for name in line} == OWN
    for line in (values, *further):
        words = ["--output_dir", "x", "--bf16", "false", "--use_cpu", "true"]
        for name, value in line.items():
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        (args,) = TrlParser(DistillConfig).parse_args_and_config(words)
        wanted = {**line, **({"teacher_model_init_kwargs": {"dtype": "float32"}} if line is values else {})}
        assert {name: getattr(args, name) for name in line} == wanted


def test_every_field_is_documented_twice_and_lists_its_choices() -> None:
    for name in OWN:
        field = DistillConfig.__dataclass_fields__[name]
        assert name in OPTIONS or f"\n        {name}: " in (DistillConfig.__doc__ or ""), name
        assert field.metadata["help"].endswith("."), name
        assert field.default is not dataclasses.MISSING, name
    choices = {name: DistillConfig.__dataclass_fields__[name].metadata.get("choices") for name in OWN}
    assert list(choices["divergence"]) == list(DIVERGENCES)
    assert choices["kd_schedule"] == choices["ce_schedule"] == choices["hidden_schedule"]
