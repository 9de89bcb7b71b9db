import pytest
from trl import TrlParser

from cbd_trl.trainers.distill_config import DistillConfig
from tests.training import assert_same_gradient, make_config, make_trainer, one_step


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kd_weight", -1.0, "kd_weight=-1.0: a weight of the loss must be finite and at least 0"),
        ("ce_weight", float("nan"), "ce_weight=nan"),
        ("hidden_weight", float("inf"), "hidden_weight=inf"),
        ("temperature", 0.0, "temperature=0.0: it divides the logits"),
        ("beta", 1.5, "beta=1.5: .* must lie between 0"),
        ("swap_probability", -0.1, "swap_probability=-0.1: .* must lie between 0 and 1"),
        ("divergence", "kl", "Unknown divergence 'kl': there are forward_kl, reverse_kl, jsd"),
        ("loss_type", "dft", "loss_type='dft' changes the loss of SFT"),
        ("label_smoothing_factor", 0.1, "label_smoothing_factor=0.1 changes the loss of SFT"),
    ],
)
def test_a_bad_value_is_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**{field: value})


def test_all_weights_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing is left to minimise"):
        make_config(kd_weight=0.0, ce_weight=0.0)


@pytest.mark.parametrize(
    "change",
    [
        {"kd_weight": 2.0},
        {"ce_weight": 0.0},
        {"divergence": "reverse_kl"},
        {"divergence": "jsd"},
        {"temperature": 2.0},
        {"hidden_weight": 1.0},
        {"swap_probability": 1.0},
    ],
    ids=str,
)
def test_every_field_changes_the_gradient(change: dict) -> None:
    _, before = one_step(make_trainer())
    _, after = one_step(make_trainer(**change))
    with pytest.raises(AssertionError):
        assert_same_gradient(after, before, rtol=1e-3)


def test_beta_changes_the_jsd_and_only_it() -> None:
    runs = {(d, b): one_step(make_trainer(divergence=d, beta=b)) for d in ("jsd", "forward_kl") for b in (0.2, 0.8)}
    assert runs["jsd", 0.2][0]["kd"] != runs["jsd", 0.8][0]["kd"]
    assert_same_gradient(runs["forward_kl", 0.2][1], runs["forward_kl", 0.8][1])


def test_the_command_line_sets_every_field() -> None:
    line = "--output_dir x --bf16 false --use_cpu true --teacher_model_name_or_path t --kd_weight 2 --divergence jsd"
    line += " --beta 0.1 --temperature 3 --ce_weight 0 --hidden_weight 1 --swap_probability 0.5"
    line += ' --teacher_model_revision r --teacher_model_init_kwargs {"dtype":"float32"}'
    (args,) = TrlParser(DistillConfig).parse_args_and_config(line.split())
    assert (args.teacher_model_name_or_path, args.teacher_model_revision) == ("t", "r")
    assert (args.kd_weight, args.divergence, args.beta, args.temperature) == (2.0, "jsd", 0.1, 3.0)
    assert (args.ce_weight, args.hidden_weight, args.swap_probability) == (0.0, 1.0, 0.5)
    assert args.teacher_model_init_kwargs == {"dtype": "float32"}
