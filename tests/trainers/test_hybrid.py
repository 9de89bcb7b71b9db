import copy
from collections import Counter

import pytest
import torch
from torch import nn

from cbd_trl.architectures import decoder_layers
from cbd_trl.surgery.blocks import blocks_of, spaced_layers
from cbd_trl.trainers.hybrid import BlockHybrid, check_swappable
from tests.tiny import FAMILIES, own_names, tiny_model
from tests.training import assert_same_gradient, make_trainer, one_step

BLOCKS = blocks_of(spaced_layers(6, 3))
IDS = torch.randint(0, 64, (2, 11), generator=torch.Generator().manual_seed(0))


def pair(family: str, seed: int = 1) -> tuple:
    """Of 3 and of 6 layers; the sorts of attention fall as they fall, alike or not within a block."""
    teacher = tiny_model(family, seed=seed + 1, **own_names(family, num_hidden_layers=6)).requires_grad_(False)
    return tiny_model(family, seed=seed, **own_names(family, num_hidden_layers=3)), teacher


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hybrid_is_the_student_with_its_last_blocks_from_the_teacher(family: str) -> None:
    student, teacher = pair(family)
    hybrid = BlockHybrid(student, teacher, BLOCKS, 1.0, seed=0)
    step = next(step for step in range(50) if len(hybrid.draw(step)) == 1)
    (swapped,) = hybrid.draw(step)
    patched = copy.deepcopy(student)
    name = next(n for n, module in patched.named_modules() if module is decoder_layers(patched))
    stack = [[layer] for layer in decoder_layers(patched)]
    stack[swapped] = [decoder_layers(teacher)[j] for j in BLOCKS[swapped]]
    patched.set_submodule(name, nn.ModuleList(layer for block in stack for layer in block))
    depth = patched.config.num_hidden_layers = sum(map(len, stack))
    if getattr(patched.config, "layer_types", None):
        sorts = [[sort] for sort in student.config.layer_types]
        sorts[swapped] = [teacher.config.layer_types[j] for j in BLOCKS[swapped]]
        patched.config.layer_types = [sort for block in sorts for sort in block]
        patched.base_model.rotary_emb = type(patched.base_model.rotary_emb)(patched.config)
    keys = list(student.state_dict())
    with torch.no_grad():
        with hybrid.swapped(step):
            logits = student(input_ids=IDS, use_cache=False).logits
        expected = patched(input_ids=IDS, use_cache=False).logits
    assert depth > 3 and (logits - expected).abs().max() <= 1e-5 * expected.std()
    assert list(student.state_dict()) == keys


def test_the_student_is_restored_when_the_forward_fails() -> None:
    student, teacher = pair("llama")
    before = list(decoder_layers(student))
    hybrid = BlockHybrid(student, teacher, BLOCKS, 1.0, seed=0)
    with pytest.raises(RuntimeError, match="out of memory"), hybrid.swapped(0):
        raise RuntimeError("out of memory")
    assert all(a is b for a, b in zip(before, decoder_layers(student), strict=True))


def test_the_draw_depends_on_seed_and_step_alone() -> None:
    student, teacher = pair("llama")
    draws = [BlockHybrid(student, teacher, BLOCKS, 0.5, seed=7).draw(step) for step in range(400)]
    assert draws == [BlockHybrid(student, teacher, BLOCKS, 0.5, seed=7).draw(step) for step in range(400)]
    assert draws != [BlockHybrid(student, teacher, BLOCKS, 0.5, seed=8).draw(step) for step in range(400)]
    multi = [i for i, block in enumerate(BLOCKS) if len(block) > 1]
    assert 0.4 < sum(map(bool, draws)) / 400 < 0.6
    assert {tuple(draw) for draw in draws if draw} == {tuple(multi[-k:]) for k in range(1, len(multi) + 1)}
    assert all(BlockHybrid(student, teacher, BLOCKS, 0.0, seed=7).draw(step) == [] for step in range(20))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "opt", "phi3"])
def test_checkpointing_changes_nothing_and_the_teacher_gets_no_gradient(family: str) -> None:
    runs = []
    for checkpointing in (False, True):
        trainer = make_trainer(family, swap_probability=1.0, hidden_weight=1.0, gradient_checkpointing=checkpointing)
        keys = list(trainer.model.state_dict())
        runs.append(one_step(trainer))
        assert all(parameter.grad is None for parameter in trainer.teacher_model.parameters())
        assert list(trainer.model.state_dict()) == keys and not trainer.teacher_model.training
    assert_same_gradient(runs[1][1], runs[0][1])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_step_trains_the_student_and_the_hybrid_beside_it(family: str) -> None:
    """The loss and the gradient are the sums of those of the two, each trained by itself."""
    blocks = [[0, 1], [2, 3]]
    beside = make_trainer(family, swap_probability=1.0, block_map=blocks)
    log, gradient = one_step(beside)
    alone, trained = make_trainer(family), make_trainer(family)
    student_log, student = one_step(alone)
    hybrid = BlockHybrid(trained.model, trained.teacher_model, blocks, 1.0, seed=beside.args.seed)
    with hybrid.swapped(0) as swapped:
        hybrid_log, of_hybrid = one_step(trained)
    assert 0 < len(swapped) <= 2 and len(of_hybrid) < len(student)
    assert_same_gradient(gradient, {n: g + of_hybrid.get(n, torch.zeros(())) for n, g in student.items()})
    assert log["hybrid"] == pytest.approx(hybrid_log["loss"], rel=1e-4)
    assert log["loss"] == pytest.approx(student_log["loss"] + hybrid_log["loss"], rel=1e-4)
    assert log["kd"] == pytest.approx(student_log["kd"], rel=1e-5) and "hybrid" not in student_log


def test_hybrids_swap_the_costliest_blocks() -> None:
    student, teacher = pair("llama")
    blocks, costs = [[0, 1], [2], [3, 4, 5]], [0.3, 9.0, 0.5]
    draws = {tuple(BlockHybrid(student, teacher, blocks, 1.0, 0, costs).draw(step)) for step in range(50)}
    assert draws == {(0,), (0, 2)}, "0.3 for one layer is more than 0.5 for two"
    assert {tuple(BlockHybrid(student, teacher, blocks, 1.0, 0).draw(step)) for step in range(50)} == {(2,), (0, 2)}
    with pytest.raises(ValueError, match="block_costs has 3 entries and the student 2 layers"):
        make_trainer(swap_probability=1.0, block_costs=costs)


def test_equal_depths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"have 4 layers each: .*Set swap_probability=0"):
        make_trainer(student=tiny_model("llama", seed=1), swap_probability=0.5)


@pytest.mark.parametrize(
    ("family", "overrides", "field"),
    [
        ("gpt2", {}, "model_type"),
        ("llama", {"hidden_size": 64, "head_dim": 16}, "hidden_size"),
        ("llama", {"head_dim": 16}, "head_dim"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}, "rope_parameters"),
    ],
)
def test_models_that_do_not_fit_are_refused(family: str, overrides: dict, field: str) -> None:
    with pytest.raises(ValueError, match=rf"but {field} is .*Set swap_probability=0"):
        make_trainer(teacher=tiny_model(family, seed=2, **overrides), swap_probability=0.5)


def test_a_packed_batch_gets_its_masks_too() -> None:
    """Rows end to end in one, told apart by their positions: full and sliding masks alike keep them apart."""
    student, teacher = pair("gemma3_text")
    hybrid = BlockHybrid(student, teacher, BLOCKS, 1.0, seed=0)
    positions = torch.cat([torch.arange(9), torch.arange(2)])[None]
    with torch.no_grad(), hybrid.swapped(0):
        packed = student(input_ids=IDS[:1], position_ids=positions, use_cache=False).logits
        rows = [student(input_ids=ids, use_cache=False).logits for ids in (IDS[:1, :9], IDS[:1, 9:])]
    assert (packed - torch.cat(rows, 1)).abs().max() <= 1e-5 * packed.std()
    assert not student.base_model._forward_pre_hooks


def test_blocks_of_other_attention_are_refused() -> None:
    student = tiny_model("qwen2", num_hidden_layers=2).config
    kinds = ["full_attention", "chunked_attention", "full_attention"]
    teacher = tiny_model("qwen2", num_hidden_layers=3, layer_types=kinds).config
    with pytest.raises(ValueError, match=r"student layer 1 uses full_attention, the teacher's layers \[1, 2\].*only"):
        check_swappable(student, teacher, [[0], [1, 2]])


def test_the_teachers_layers_are_checkpointed_with_the_students() -> None:
    """Each swapped one runs for the teacher's own output, for the hybrid, and for the hybrid's gradient."""
    for checkpointing, times in ((False, 2), (True, 3)):
        trainer = make_trainer(swap_probability=1.0, gradient_checkpointing=checkpointing)
        swapped = trainer._pairs.hybrid.draw(0)
        layers = [layer for i in swapped for layer in trainer._pairs.hybrid.blocks[i].layers]
        ran = Counter[nn.Module]()
        for layer in layers:
            layer.register_forward_pre_hook(lambda module, _, ran=ran: ran.update([module]))
        one_step(trainer)
        assert ran == dict.fromkeys(layers, times)


def test_reentrant_checkpointing_is_refused() -> None:
    with pytest.raises(ValueError, match="Leave use_reentrant unset"):
        make_trainer(swap_probability=0.5, gradient_checkpointing_kwargs={"use_reentrant": True})
