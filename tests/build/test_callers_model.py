"""A model given in memory is the caller's: on its own device afterwards, and not held while a chain is built."""

import gc
import weakref
from typing import Any

import pytest
import torch
from accelerate import dispatch_model

from cbd_trl import build_chain
from cbd_trl.build import build as build_module
from cbd_trl.utils.modeling import on_device
from tests.build.bridged import ANCHORS, anchor_zero, bridge_step, build_bridged, rows, source
from tests.chain.helpers import CHAIN_ANCHORS, chain_config, chain_rows, chain_source
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer
from tests.trainers.bridge_runs import teachers_tokenizer


class Moved:
    """A model whose moves are written down, not made."""

    def __init__(self, **fields: Any) -> None:
        self.device, self.moves = torch.device("cpu"), []
        vars(self).update(fields)

    def to(self, device: torch.device) -> None:
        self.moves.append(str(device))


def test_a_model_is_put_back_on_its_device_even_after_an_error() -> None:
    model: Any = Moved()
    with pytest.raises(KeyError), on_device(model, torch.device("cuda")):
        raise KeyError
    assert model.moves == ["cuda", "cpu"]
    spread: Any = Moved(hf_device_map={"model": 0, "lm_head": "cpu"})
    with on_device(spread, torch.device("cuda")):
        assert not spread.moves


def test_a_build_moves_the_source_and_puts_it_back(tmp_path, monkeypatch) -> None:
    model, moves, to = chain_source(), [], torch.nn.Module.to

    def moved(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is model:
            moves.append(args[0])
        return to(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "to", moved)
    monkeypatch.setattr(build_module, "_make_anchors", lambda *_: None)
    arguments = {"dataset": chain_rows(), "processing_class": tiny_tokenizer(), "calibration_tokens": 64}
    build_chain(model, CHAIN_ANCHORS, output_dir=tmp_path / "chain", args=chain_config(), **arguments)
    assert moves == [chain_config().device, torch.device("cpu")]


@pytest.mark.parametrize("by_name", [False, True])
def test_an_offloaded_source_is_refused(tmp_path, by_name) -> None:
    """Its weights are to be read, and are not there."""
    model: Any = chain_source()
    places = {name: "cpu" for name in ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")}
    places |= {f"model.layers.{i}": "disk" for i in range(6)}
    options: dict[str, Any] = {"dataset": chain_rows(), "processing_class": tiny_tokenizer()}
    if by_name:
        model.save_pretrained(tmp_path / "source")
        model = tmp_path / "source"
        args = chain_config(model_init_kwargs={"device_map": places, "offload_folder": str(tmp_path / "offloaded")})
    else:
        args = chain_config()
        dispatch_model(model, places, offload_dir=tmp_path / "offloaded")
    with pytest.raises(ValueError, match="The source has 54 weights that its device_map offloaded"):
        build_chain(model, CHAIN_ANCHORS, output_dir=tmp_path / "chain", args=args, **options)


@pytest.mark.parametrize("bridged", [False, True])
def test_the_weights_are_let_go_once_they_are_stored(tmp_path, monkeypatch, bridged) -> None:
    models = [source(), anchor_zero()] if bridged else [chain_source()]
    known, alive = [weakref.ref(model) for model in models], []

    def watch(*_: Any) -> None:
        gc.collect()
        alive.append([one() for one in known])

    monkeypatch.setattr(build_module, "_make_anchors", watch)
    # Arguments by `*` or `**` would be held by this call itself.
    build_chain(
        models.pop(0),
        ANCHORS if bridged else CHAIN_ANCHORS,
        dataset=rows() if bridged else chain_rows(),
        output_dir=tmp_path / "chain",
        args=chain_config(),
        processing_class=teachers_tokenizer() if bridged else tiny_tokenizer(),
        bridge=bridge_step(model=models.pop(0)) if bridged else None,
        calibration_tokens=64,
    )
    assert alive == [[None] * len(known)]


def test_a_bridges_teacher_is_left_with_its_own_forward(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(build_module, "_make_anchors", lambda *_: None)
    teacher = source()
    before = dict(vars(teacher))
    build_bridged(tmp_path / "chain", source=teacher)
    assert vars(teacher).keys() == before.keys() and "forward" not in vars(teacher)
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert teacher(torch.arange(9)[None]).logits.equal(tiny_source_logits())


def tiny_source_logits() -> torch.Tensor:
    like = {"vocab_size": 420, "num_hidden_layers": 2, "max_position_embeddings": 128}
    return tiny_model("llama", seed=2, **like)(torch.arange(9)[None]).logits
