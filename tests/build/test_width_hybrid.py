"""Hybrids in width: by function the targets of `nested`, and a gradient that goes through the mix."""

import dataclasses
import random

import pytest
import torch
from accelerate import cpu_offload
from datasets import Dataset
from peft import LoraConfig

from cbd_trl import build_chain
from cbd_trl.architectures import describe
from cbd_trl.build.width_hybrid import (
    FRACTIONS,
    MixedModel,
    WidthHybrid,
    many_targets_between,
    parameters_of,
    targets_between,
    weights_of_teacher,
)
from cbd_trl.losses.held_out import held_out_loss
from cbd_trl.losses.hidden import mean_hidden_distance
from cbd_trl.shapes.cut import cut_architecture
from cbd_trl.surgery.least_squares import Fit
from cbd_trl.surgery.weights import to_state, weights_of
from cbd_trl.targets.from_chain import from_chain, load_pair
from cbd_trl.targets.operators import Plan, cut_upper, mixer, nested, patch, upper_fits
from cbd_trl.trainers.hybrid import Pass
from tests.build.test_trained_apart import trained
from tests.build.width_pairs import single, width_pair, width_trainer
from tests.chain.helpers import between, chain_source, random_pair
from tests.markov import markov_text
from tests.surgery.helpers import TOLERANCE, build, logits, tokens
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer
from tests.trainers.dense import dense_terms, gradients, scored_logits
from tests.training import assert_same_gradient, make_config, make_trainer, one_step, text_rows

CASES = [
    ("llama", True, "width"),
    ("llama", False, "both"),
    ("qwen3", False, "width"),
    ("phi3", True, "width"),
    ("gemma2", True, "width"),
    ("gemma2", False, "both"),
    ("olmo2", True, "both"),
    ("gpt2", True, "width"),
    ("opt", False, "both"),
    # Readers of one stream with and without a bias, a tied head with one, constants, norms without gains.
    ("cohere2", True, "width"),
    ("phi", True, "both"),
    ("apertus", False, "width"),
    ("nanochat", False, "both"),
]
every_case = pytest.mark.parametrize(("family", "tied", "what"), CASES)
TERMS = ("loss", "kd", "ce", "hidden", "hybrid")


def every_target(hybrid, student):
    """The passes of the first steps in which each target comes once, with its architecture."""
    found = {}
    for step in range(50):
        with hybrid.at(step, Pass(student, student)) as beside:
            found.setdefault(id(beside.model), beside)
    return [(beside, describe(beside.model.config)) for beside in found.values()]


def expected_weights(pair, shape, lower):
    """What `nested` makes at this shape of the upper anchor and these weights of the lower one."""
    target = cut_architecture(pair.upper_architecture, shape)
    return nested(dataclasses.replace(pair, lower=lower), Plan(target))


def mix(pair, shape, lower):
    """The same before its norms are balanced: linear in each of the lower anchor's tensors but for folded gains."""
    plan = Plan(cut_architecture(pair.upper_architecture, shape))
    cut, made = cut_upper(pair, plan)
    return mixer(pair, plan)(cut, lower), made


@every_case
def test_a_hybrid_is_the_target_between_the_teacher_and_the_student_as_it_is(family, tied, what):
    student, _, pair = width_pair(family, tied, what)
    hybrid = WidthHybrid(pair, 1.0, seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        found = every_target(hybrid, student)
        assert len(found) == len(FRACTIONS)
        for beside, architecture in found:
            weights, made = expected_weights(pair, architecture.shape, weights_of(student, pair.lower_architecture))
            reference = logits(build({key: tensor.float() for key, tensor in weights.items()}, made))
            ours = beside.run(input_ids=tokens()).logits
            assert (ours - reference).abs().max() <= TOLERANCE * reference.std()
            assert all(parameter.is_meta for parameter in beside.model.parameters())


def dense_refit(fit, matrix, share, gain=None):
    """What `Fit.refitted` computes, in one piece, differentiated by autograd."""
    whole = matrix if gain is None else matrix * gain
    return whole[:, fit.kept] + share * whole[:, fit.rows] @ fit.matrix.to(whole)


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("family", "tied", "what"),
    [
        ("llama", True, "both"),
        ("llama", False, "depth"),
        ("gpt2", True, "width"),
        *(slow("gemma2", tied, what) for tied in (True, False) for what in ("depth", "width", "both")),
        *(slow(*case) for case in CASES if case[0] not in ("gemma2", "gpt2")),
    ],
)
def test_both_anchors_are_trained_by_a_target(family, tied, what, monkeypatch):
    """It computes what `nested` makes, and its gradient is that of a dense twin, the fits left as they are."""
    pair = single(random_pair(family, tied, what))
    plan = Plan(between(pair))

    def anchors():
        upper, lower = build(pair.upper, pair.upper_architecture), build(pair.lower, pair.lower_architecture)
        views = parameters_of(upper, pair.upper_architecture), parameters_of(lower, pair.lower_architecture)
        return {"upper": upper, "lower": lower}, dataclasses.replace(pair, upper=views[0], lower=views[1])

    def found(models):
        return {f"{role} {name}": grad for role, model in models.items() for name, grad in gradients(model).items()}

    models, live = anchors()
    outputs = MixedModel(pair, plan, live.upper).mixed_with(models["lower"]).run(input_ids=tokens()).logits
    weights, made = nested(pair, plan)
    reference = logits(build({key: tensor.float() for key, tensor in weights.items()}, made))
    assert (outputs - reference).abs().max() <= TOLERANCE * reference.std()
    outputs.logsumexp(-1).mean().backward()

    twins, live = anchors()
    if pair.equal_widths:
        weights = patch(live, plan)[0]
    else:
        fits = upper_fits(pair, plan)
        monkeypatch.setattr(Fit, "refitted", dense_refit)
        weights = mixer(pair, plan)(cut_upper(live, plan, lambda *key: fits[key])[0], live.lower)
    target = build({key: tensor.detach().float() for key, tensor in weights.items()}, made)
    target(input_ids=tokens()).logits.logsumexp(-1).mean().backward()
    state = to_state(weights, made)
    sum((slope * state[name]).sum() for name, slope in gradients(target).items()).backward()
    assert_same_gradient(found(models), found(twins), rtol=1e-4)
    assert all(any(grad.any() for grad in gradients(model).values()) for model in models.values())


def test_a_hybrid_is_what_from_chain_makes_of_the_stored_anchors(chain):
    upper, lower = chain.anchors[1:]
    student = lower.load_model()
    hybrid = WidthHybrid(dataclasses.replace(load_pair(upper, lower), lower={}), 1.0, seed=0)
    for beside, architecture in every_target(hybrid, student):
        reference = logits(from_chain(chain, config=architecture.shape))
        with torch.no_grad():
            ours = beside.run(input_ids=tokens()).logits
        assert (ours - reference).abs().max() <= TOLERANCE * reference.std()


@pytest.mark.parametrize(("family", "tied", "what"), [CASES[i] for i in (0, 1, 4, 7)])
def test_the_gradient_is_that_of_the_mix(family, tied, what):
    """Weights of the target are polynomials of degree 2 in each of the student's tensors, at most: differences of any
    length are derivatives, of the loss linearised at the target."""
    student, _, pair = width_pair(family, tied, what)
    beside, architecture = every_target(WidthHybrid(pair, 1.0, seed=0), student)[0]
    weights, made = mix(pair, architecture.shape, weights_of(student, pair.lower_architecture))
    target = build({key: tensor.float() for key, tensor in weights.items()}, made)
    for run in (beside.run, target):
        run(input_ids=tokens()).logits.logsumexp(-1).mean().backward()
    slopes = gradients(target)
    generator = torch.Generator().manual_seed(0)
    every = [*student.named_parameters()]
    # What is around the layers, the first layer and the last one.
    for name, parameter in every[:18] + every[-18:]:
        direction = torch.randn(parameter.shape, generator=generator) / parameter.numel() ** 0.5
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign)
                moved, made = mix(pair, architecture.shape, weights_of(student, pair.lower_architecture))
                state = dict(build({k: t.float() for k, t in moved.items()}, made).named_parameters())
                values.append(sum((slopes[n].double() * state[n].double()).sum() for n in slopes))
                parameter.add_(direction, alpha=-sign)
        if parameter.grad is None:  # of a layer whose block is the upper anchor's
            assert what == "both" and values[0] == values[1], name
            continue
        derivative = (parameter.grad.double() * direction).sum()
        scale = parameter.grad.double().norm() * direction.norm()
        assert scale > 0 and (derivative - (values[0] - values[1]) / 2).abs() <= 1e-4 * scale, name


@pytest.mark.parametrize(("family", "tied", "what"), [CASES[i] for i in (0, 1, 5)])
def test_a_step_trains_the_student_and_the_hybrid_beside_it(family, tied, what):
    """The gradient is the sum of that of the plain step and that of the hybrid's loss, taken the long way round."""
    options = {"hidden_weight": 1.0, "hidden_loss": "mse", "ce_weight": 0.5}
    beside_log, gradient = one_step(width_trainer(family, tied, what, **options))
    plain_log, plain = one_step(width_trainer(family, tied, what, swap_probability=0.0, **options))
    student, teacher, pair = width_pair(family, tied, what)
    student.train()
    hybrid = WidthHybrid(pair, 1.0, seed=42)
    ids = [tiny_tokenizer()(row["text"] + " </s>")["input_ids"] for row in text_rows()]
    with hybrid.at(0, Pass(student, student)) as drawn:
        terms = dense_terms(drawn.run, [teacher], ids)
        states: dict = {}

        def keep(into, i):
            return lambda module, args, output: into.setdefault(i, []).append(
                (output[0] if isinstance(output, tuple) else output)[0, :-1]
            )

        ours = [(i, layer) for i, layer in hybrid.layers if any(layer is module for module in drawn.model.modules())]
        assert len(ours) == len(pair.blocks)
        theirs = [(-1 - i, teacher.model.layers[block[-1]]) for i, block in enumerate(pair.blocks)]
        handles = [layer.register_forward_hook(keep(states, i)) for i, layer in ours + theirs]
        scored_logits(drawn.run, ids, ids)
        with torch.no_grad():
            scored_logits(teacher, ids, ids)
        for handle in handles:
            handle.remove()
    pairs = [(torch.cat(states[i]), torch.cat(states[-1 - i])) for i, _ in ours]
    hidden = mean_hidden_distance(pairs, "mse").mean()
    loss = terms["kd"] + 0.5 * terms["ce"] + hidden
    loss.backward()
    naive = gradients(student)
    assert_same_gradient(gradient, {name: plain[name] + naive[name] for name in plain}, rtol=1e-4)
    assert beside_log["hybrid"] == pytest.approx(loss.item(), rel=1e-4)
    assert beside_log["loss"] == pytest.approx(plain_log["loss"] + loss.item(), rel=1e-4)
    assert beside_log["kd"] == pytest.approx(plain_log["kd"], rel=1e-5) and "hybrid" not in plain_log


def same_step(one, other):
    assert_same_gradient(other[1], one[1])
    for name in TERMS:
        assert other[0][name] == pytest.approx(one[0][name], rel=1e-5), name


@pytest.mark.parametrize(
    "how",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"gradient_checkpointing": True},
        {"packing": True, "max_length": 20},
    ],
    ids=["accumulated 2", "accumulated 4", "checkpointed", "packed"],
)
def test_how_a_step_is_taken_changes_nothing(how):
    options = {"hidden_weight": 1.0, "gradient_checkpointing": False}
    same_step(one_step(width_trainer(**options)), one_step(width_trainer(**{**options, **how})))


def test_checkpoints_hold_the_student_alone_and_resume_exactly(tmp_path):
    how = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "hidden_weight": 1.0, "swap_probability": 0.5}
    how |= {"per_device_train_batch_size": 2, "train_dataset": text_rows((3, 9, 5, 12, 2, 7, 4, 6))}
    whole = width_trainer(output_dir=str(tmp_path / "whole"), **how)
    keys = list(whole.model.state_dict())
    whole.train()
    had = ["hybrid" in entry and entry["hybrid"] > 0 for entry in whole.state.log_history if "loss" in entry]
    # Behind the checkpoint too, and not everywhere: else resuming could not go wrong.
    assert any(had[2:]) and not all(had)
    resumed = width_trainer(output_dir=str(tmp_path / "resumed"), **how)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert list(whole.model.state_dict()) == keys
    layers = whole.model.model.layers
    assert not any(module._forward_hooks for layer in layers for module in layer.modules())


def test_a_hybrid_runs_as_the_student_does():
    """In its dtype under autocast, in its mode, with its attention."""
    trainer = width_trainer(bf16=True, hidden_weight=1.0)
    seen = set()
    for _, layer in trainer._pairs.hybrid.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda module, args, output: seen.add((output.dtype, module.training)))
    one_step(trainer)
    assert seen == {(torch.bfloat16, True)}
    student, _, pair = width_pair()
    student.set_attn_implementation("eager")
    hybrid = WidthHybrid(pair, 1.0, seed=0)
    with hybrid.at(0, Pass(student.bfloat16(), student)) as beside:
        assert beside.model.config._attn_implementation == "eager" and not beside.model.training
        assert beside.run(input_ids=tokens()).logits.dtype == torch.bfloat16


def test_the_weights_of_a_teacher_are_read_where_they_are():
    _, teacher, pair = width_pair("gemma2")
    key = "model.layers.0.mlp.up_proj.weight"
    weights = weights_of_teacher(teacher, pair.upper_architecture, {key: torch.zeros(())})
    assert all(torch.allclose(weights[name].float(), pair.upper[name].float()) for name in pair.upper)
    parameter = teacher.get_parameter(key)
    assert weights[key].data_ptr() == parameter.data_ptr() and not weights[key].requires_grad
    cpu_offload(teacher, execution_device=torch.device("cpu"))
    assert teacher.get_parameter(key).is_meta and weights[key].dim() == 0


def test_gains_that_no_teacher_stores_are_read_all_the_same():
    _, teacher, pair = width_pair("nanochat", False)
    gains = [name for name in pair.upper if name not in pair.upper_architecture.stored]
    weights = weights_of_teacher(teacher, pair.upper_architecture, {name: torch.zeros(()) for name in gains})
    assert gains and all((weights[name] == 1).all() and weights[name].shape == (32,) for name in gains)
    cpu_offload(teacher, execution_device=torch.device("cpu"))
    assert all(weights[name].dim() == 0 for name in gains)


def test_the_draw_depends_on_seed_and_step_alone():
    student, _, pair = width_pair()

    def draws(seed, probability=0.5):
        hybrid = WidthHybrid(pair, probability, seed)
        found = []
        for step in random.Random(0).sample(range(60), 60):
            with hybrid.at(step, Pass(student, student)) as beside:
                found.append((step, beside and describe(beside.model.config).shape["hidden_size"]))
        return [width for _, width in sorted(found)]

    assert draws(7) == draws(7) != draws(8)
    assert 0.3 < sum(width is not None for width in draws(7)) / 60 < 0.7
    assert len(set(draws(7, 1.0))) == 3 and set(draws(7, 0.0)) == {None}


def test_targets_lie_at_a_quarter_a_half_and_three_quarters_of_the_way():
    for what in ("width", "both"):
        _, _, pair = width_pair("llama", True, what)
        upper, lower = pair.upper_architecture, pair.lower_architecture
        span = upper.num_parameters - lower.num_parameters
        found = [(t.num_parameters - lower.num_parameters) / span for t in targets_between(upper, lower, pair.blocks)]
        assert found == pytest.approx(FRACTIONS, abs=0.125)


def test_many_targets_are_near_the_lower_anchor_and_off_the_line_too():
    upper = describe(tiny_model("llama", num_hidden_layers=12, hidden_size=64, intermediate_size=192).config)
    lower = cut_architecture(upper, {"num_hidden_layers": 6, "hidden_size": 32, "intermediate_size": 96})
    blocks = [[2 * i, 2 * i + 1] for i in range(6)]
    usual, many = (find(upper, lower, blocks) for find in (targets_between, many_targets_between))
    shapes = [target.shape for target in many]
    assert all(target.shape in shapes for target in usual) and len(many) > 2 * len(usual)
    assert all(shapes.count(shape) == 1 for shape in shapes)
    span = upper.num_parameters - lower.num_parameters
    shares = [(target.num_parameters - lower.num_parameters) / span for target in many]
    assert 0.05 < min(shares) < 0.15 and max(shares) < 0.8
    # At one size both deeper and shallower ones.
    middle = [target.depth for target, share in zip(many, shares, strict=True) if 0.45 < share < 0.55]
    assert len(set(middle)) > 1
    assert (
        many_targets_between(upper, cut_architecture(upper, {"intermediate_size": 191}), [[i] for i in range(12)])
        == []
    )


def test_nothing_between_is_refused():
    upper = describe(chain_source().config)
    lower = cut_architecture(upper, {"intermediate_size": 47})
    blocks = [[i] for i in range(6)]
    assert targets_between(upper, lower, blocks) == []
    _, _, pair = width_pair()
    pair = dataclasses.replace(pair, upper_architecture=upper, lower_architecture=lower, blocks=blocks)
    with pytest.raises(ValueError, match=r"swap_probability=0.5 trains models between .* no shape lies between the"):
        WidthHybrid(pair, 0.5, seed=0)


def test_a_hybrid_that_would_not_be_trained_is_refused():
    student, teacher, pair = width_pair()
    hybrid = WidthHybrid(pair, 1.0, seed=0)
    with pytest.raises(ValueError, match="swap_probability=None: no step would train it"):
        make_trainer(student=student, teacher=teacher, hybrid=hybrid)
    adapter = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"not those of an adapter. Leave out peft_config"):
        make_trainer(student=student, teacher=teacher, hybrid=hybrid, swap_probability=0.5, peft_config=adapter)
    with pytest.raises(ValueError, match=r"but hidden_size is .*Set swap_probability=0"):
        make_trainer(student=tiny_model("llama", hidden_size=16), teacher=teacher, swap_probability=0.5)


@pytest.mark.slow
def test_models_between_two_widths_are_better_for_it(tmp_path):
    """All of them, others than those trained among them, and the anchor is not worse."""
    source = trained("llama", {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}, seed=1)
    rows = Dataset.from_dict({"input_ids": markov_text(1600, 24, seed=1).tolist()})
    narrow = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    held_out, losses = markov_text(64, 24, seed=2), []
    for swap in (0.0, 0.5):
        args = make_config(
            max_steps=100, per_device_train_batch_size=16, learning_rate=3e-3, swap_probability=swap, logging_steps=50
        )
        chain = build_chain(
            source,
            [narrow],
            dataset=rows,
            output_dir=tmp_path / str(swap),
            args=args,
            processing_class=tiny_tokenizer(),
            calibration_tokens=1024,
        )
        large, small = (anchor.num_parameters for anchor in chain.anchors)
        models = [
            from_chain(chain, small + share * (large - small), tolerance=0.2) for share in (0.25, 0.4, 0.6, 0.75)
        ]
        losses.append([held_out_loss(model, held_out) for model in (chain.anchors[1].load_model(), *models)])
    (plain, *without), (beside, *with_hybrids) = losses
    assert beside < plain + 0.01
    assert all(ours < theirs for ours, theirs in zip(with_hybrids, without, strict=True))
    assert sum(without) - sum(with_hybrids) > 4 * 0.01
