from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cbd_trl.trainers import packing as row_attention
from cbd_trl.trainers.packing import NAME, attention_within_rows
from tests.tiny import FAMILIES, SDPA_FAMILIES, tiny_model
from tests.training import assert_same_gradient, make_trainer, one_step, text_rows


def packed_inputs(lengths: tuple[int, ...]) -> dict[str, Any]:
    ends = torch.tensor((0, *lengths)).cumsum(0).int()
    return {
        "input_ids": torch.arange(sum(lengths))[None] % 50 + 6,
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "row_bounds": tuple(ends.tolist()),
        "use_cache": False,
    }


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of what is attended at once."""
    lengths: list[int] = []
    plain = row_attention.sdpa_attention_forward

    def count(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths.append(query.shape[2])
        return plain(module, query, *args, **kwargs)

    monkeypatch.setattr(row_attention, "sdpa_attention_forward", count)
    return lengths


@pytest.mark.parametrize("lengths", [(5, 9, 1, 12), (11,)], ids=str)
@pytest.mark.parametrize("family", SDPA_FAMILIES)
def test_rows_by_themselves_are_the_packed_rows(family: str, lengths: tuple[int, ...], attended: list[int]) -> None:
    model, inputs = tiny_model(family), packed_inputs(lengths)
    if family == "opt":
        # Otherwise packed rows see each other in it.
        rows = inputs["input_ids"].split(lengths, dim=1)
        expected = torch.cat([model(row, use_cache=False).logits for row in rows], dim=1)
        attended.clear()
    else:
        expected = model(**inputs).logits
    with attention_within_rows([model]):
        assert model.config._attn_implementation == NAME
        found = model(**inputs).logits
    assert model.config._attn_implementation == "sdpa"
    assert (found - expected).abs().max() <= 1e-5 * expected.std()
    assert attended == list(lengths) * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_is_attended_as_ever(family: str) -> None:
    model = tiny_model(family)
    ids = torch.arange(18).view(2, 9) + 6
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # on the left, as in generation
    expected = model(input_ids=ids, attention_mask=mask).logits
    with attention_within_rows([model]):
        found = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_whose_packed_rows_see_each_other_is_refused(role: str) -> None:
    leaky = tiny_model("opt", seed=1, attn_implementation="eager")
    with pytest.raises(ValueError, match=r"see each other in OPTForCausalLM with attn_implementation='eager'.*=False"):
        make_trainer("opt", **{role: leaky}, packing=True, max_length=20)
    make_trainer("opt", **{role: leaky})
    make_trainer("opt", packing=True, max_length=20)


def test_training_attends_by_row_and_leaves_the_models_as_they_were(
    tmp_path: Path, attended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"packing": True, "max_length": 30, "eval_dataset": text_rows(seed=5), "hidden_weight": 1.0}
    how |= {
        "output_dir": str(tmp_path),
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    rows = make_trainer(**how)
    logs, gradients = one_step(rows)
    assert attended and max(attended) <= 13  # the longest row and its eos, not the pack
    for model in (rows.model, rows.teacher_model):
        assert model.config._attn_implementation == "sdpa"
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    assert (
        saved.config._attn_implementation == "sdpa" and NAME not in (tmp_path / "checkpoint-1/config.json").read_text()
    )
    monkeypatch.setattr(row_attention, "NAME", "sdpa")
    plain_logs, plain_gradients = one_step(make_trainer(**how))
    assert logs["loss"] == pytest.approx(plain_logs["loss"], rel=1e-5)
    assert_same_gradient(gradients, plain_gradients)
