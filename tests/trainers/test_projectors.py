import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from cbd_trl.losses.hidden import mean_hidden_distance
from cbd_trl.trainers.hidden_states import (
    FILE,
    NAME,
    Projectors,
    attached,
    load_projectors,
    save_projectors,
    without_projectors,
)
from tests.tiny import tiny_model


def student(lora: bool = False) -> torch.nn.Module:
    model = tiny_model("llama", num_hidden_layers=2, hidden_size=16)
    if lora:
        return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", bias="all", task_type="CAUSAL_LM"))
    return model


def saved_keys(folder: Path) -> set[str]:
    keys: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            keys.update(tensors.keys())
    return keys


def assert_same(one: Projectors, other: Projectors, same: bool = True) -> None:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) is same for ours, theirs in pairs)


@pytest.mark.parametrize(("narrow", "wide"), [(6, 10), (10, 6), (8, 8)])
def test_they_start_as_orthogonal_maps(narrow: int, wide: int) -> None:
    projectors = Projectors(3, narrow, wide)
    assert len(list(projectors.parameters())) == 3
    for layer in projectors.layers:
        weight = layer.weight.detach()
        assert weight.shape == (wide, narrow) and weight.dtype == torch.float32
        gram = weight.T @ weight if wide >= narrow else weight @ weight.T
        torch.testing.assert_close(gram, torch.eye(min(narrow, wide)), atol=1e-5, rtol=0)
    assert all(parameter.requires_grad for parameter in projectors.parameters())


def test_the_seed_alone_decides_the_start() -> None:
    before = torch.get_rng_state()
    one = Projectors(2, 6, 10, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert_same(one, Projectors(2, 6, 10, seed=3))
    assert_same(one, Projectors(2, 6, 10, seed=4), same=False)
    assert not torch.equal(one.layers[0].weight, one.layers[1].weight)


def test_each_pair_has_its_own_map_and_half_precision_goes_in() -> None:
    projectors, states = Projectors(2, 6, 10), torch.randn(3, 6, dtype=torch.bfloat16)
    for index, layer in enumerate(projectors.layers):
        projected = projectors(index, states)
        assert projected.dtype == torch.float32
        assert torch.equal(projected, states.float() @ layer.weight.T)


@pytest.mark.parametrize("loss", ["cosine", "mse"])
def test_they_learn_a_map_that_exists(loss: str) -> None:
    generator = torch.Generator().manual_seed(0)
    states, true_map = torch.randn(64, 6, generator=generator), torch.randn(6, 10, generator=generator)
    projectors = Projectors(1, 6, 10)
    optimizer = torch.optim.Adam(projectors.parameters(), lr=0.05)
    for _ in range(200):
        distance = mean_hidden_distance([(projectors(0, states), states @ true_map)], loss).mean()
        optimizer.zero_grad()
        distance.backward()
        optimizer.step()
    assert distance < 1e-2


@pytest.mark.parametrize("size", ["pairs", "student_width", "teacher_width"])
def test_an_empty_projector_is_refused(size: str) -> None:
    sizes = {"pairs": 1, "student_width": 2, "teacher_width": 3, size: 0}
    with pytest.raises(ValueError, match=rf"{size}=0: projectors map .* Set hidden_weight=0"):
        Projectors(**sizes)


@pytest.mark.parametrize("lora", [False, True])
def test_they_are_parameters_of_the_student_while_attached(lora: bool) -> None:
    model, projectors = student(lora), Projectors(2, 16, 32)
    before, ours = list(model.state_dict()), {id(p) for p in projectors.parameters()}
    with attached(model, projectors):
        trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        assert ours <= trained.keys()
        assert all(f"{NAME}.layers." in trained[key] for key in ours)
        assert list(without_projectors(model.state_dict())) == before
    assert list(model.state_dict()) == before and not hasattr(model, NAME)


@pytest.mark.parametrize("lora", [False, True])
def test_saving_the_student_while_attached_leaves_them_out(lora: bool, tmp_path: Path) -> None:
    model, projectors = student(lora), Projectors(2, 16, 32)
    model.save_pretrained(tmp_path / "before")
    with attached(model, projectors):
        model.save_pretrained(tmp_path / "during")
        model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
        model.save_pretrained(tmp_path / "shards", **({} if lora else {"max_shard_size": "10KB"}))
    model.save_pretrained(tmp_path / "after")
    keys = saved_keys(tmp_path / "before")
    assert keys and not any(NAME in key for key in keys)
    assert all(saved_keys(tmp_path / name) == keys for name in ("during", "given", "shards", "after"))


def test_a_merged_student_is_saved_without_them(tmp_path: Path) -> None:
    model = student(lora=True)
    with attached(model, Projectors(2, 16, 32)):
        model.merge_and_unload().save_pretrained(tmp_path)
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"]


def test_they_are_taken_off_after_an_error() -> None:
    model = student()
    ignored = model._keys_to_ignore_on_save
    with pytest.raises(KeyError, match="stop"), attached(model, Projectors(2, 16, 32)):
        raise KeyError("stop")
    assert not hasattr(model, NAME) and model._keys_to_ignore_on_save is ignored


def test_a_taken_name_is_refused_and_left_alone() -> None:
    model, first = student(), Projectors(2, 16, 32)
    with attached(model, first):
        with (
            pytest.raises(ValueError, match=r"LlamaForCausalLM already has .*'distill_projectors'.*`del model"),
            attached(model, Projectors(2, 16, 32)),
        ):
            pass
        assert getattr(model, NAME) is first


def test_wrapped_keys_are_recognised_and_similar_ones_kept() -> None:
    own = {"model.embed.weight": 0, "my_distill_projectors.weight": 1, "lm_head.weight": 2}
    theirs = {f"{prefix}{NAME}.layers.0.weight": 3 for prefix in ("", "module.", "_orig_mod.base_model.model.")}
    assert without_projectors({**theirs, **own}) == own


def test_saved_and_loaded_they_are_the_same(tmp_path: Path) -> None:
    saved, loaded = Projectors(2, 6, 10, seed=1), Projectors(2, 6, 10, seed=2)
    save_projectors(saved, tmp_path / "checkpoint-1")
    assert os.listdir(tmp_path / "checkpoint-1") == [FILE]
    load_projectors(loaded, tmp_path / "checkpoint-1")
    assert_same(saved, loaded)


def test_a_checkpoint_without_them_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"has no {FILE}.*Resume from a checkpoint of a run with the same arguments"):
        load_projectors(Projectors(2, 6, 10), tmp_path)


@pytest.mark.parametrize("sizes", [(3, 6, 10), (2, 6, 12), (2, 8, 10)])
def test_projectors_of_other_models_are_refused(sizes: tuple[int, int, int], tmp_path: Path) -> None:
    save_projectors(Projectors(*sizes), tmp_path)
    projectors, before = Projectors(2, 6, 10), Projectors(2, 6, 10)
    with pytest.raises(ValueError, match=r"holds projectors .*this run needs .*\(10, 6\).*of other models"):
        load_projectors(projectors, tmp_path)
    assert_same(projectors, before)
