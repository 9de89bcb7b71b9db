"""Models that attend with FlashAttention, played by `tests.flash`: it takes 16 bits alone, as autocast makes them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cbd_trl import build_chain, from_chain
from cbd_trl.build import build as build_module
from cbd_trl.cache import write_cache
from cbd_trl.losses.held_out import held_out_loss
from cbd_trl.trainers.distill_trainer import DistillTrainer
from tests.build.bridged import anchor_zero, bridge_config, bridge_step, build_bridged, source
from tests.cache.helpers import make_args, token_dataset
from tests.chain.helpers import CHAIN_ANCHORS, WIDE, chain_config, chain_rows, chain_source
from tests.flash import FLASH, FlashAttention, install
from tests.generation.helpers import complete, rows_of, tiny_teacher
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer
from tests.trainers.bridge_runs import make_bridge
from tests.trainers.bridge_runs import student as bridge_student
from tests.trainers.bridge_runs import teacher as bridge_teacher
from tests.training import assert_same_gradient, make_trainer, one_step, text_rows

BF16, FLOAT32 = torch.bfloat16, torch.float32


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> FlashAttention:
    """FlashAttention, with the CPU for an accelerator."""
    return install(monkeypatch)


def attending(model: Any, how: str = FLASH, dtype: torch.dtype = FLOAT32) -> Any:
    """A model with this attention and dtype."""
    model.set_attn_implementation(how)
    return model.to(dtype)


def pair(how: str, dtype: torch.dtype = FLOAT32) -> dict[str, Any]:
    """Student and teacher of `make_trainer`."""
    student, teacher = tiny_model("llama", seed=1, num_hidden_layers=2), tiny_model("llama", seed=2)
    return {"student": attending(student, how, dtype), "teacher": attending(teacher, how, dtype)}


@pytest.mark.filterwarnings("ignore:.*bfloat16 weights")
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", [FLOAT32, BF16], ids=["autocast", "bf16"])
def test_training_and_evaluation(flash: FlashAttention, dtype: torch.dtype, packing: bool) -> None:
    """Before, in and after a training the loss is that of SDPA, to the precision of bfloat16."""
    how = {"bf16": True, "packing": packing, "hidden_weight": 1.0, "swap_probability": 1.0}
    found = {}
    for attention in ("sdpa", FLASH):
        trainer = make_trainer(**pair(attention, dtype), eval_dataset=text_rows(), **how)
        before = trainer.evaluate()["eval_loss"]
        logs, grads = one_step(trainer)
        found[attention] = (torch.tensor([before, logs["loss"], trainer.evaluate()["eval_loss"]]), grads)
        assert bool(flash.calls) == (attention == FLASH)
    torch.testing.assert_close(found[FLASH][0], found["sdpa"][0], rtol=2e-2, atol=0.0)
    assert_same_gradient(found[FLASH][1], found["sdpa"][1], rtol=0.1)
    assert set(flash.calls) == {BF16}


def test_a_teacher_by_name_attends_like_the_student(flash: FlashAttention, tmp_path: Path) -> None:
    tiny_model("llama", seed=2).save_pretrained(tmp_path)
    trainer = make_trainer(student=pair(FLASH)["student"], teacher=str(tmp_path), bf16=True)
    one_step(trainer)
    assert trainer.teacher_model.config._attn_implementation == FLASH
    # Two layers of the student and four of the teacher; the student's once more for its checkpointed backward pass.
    assert flash.calls == [BF16] * 8


def test_a_resumed_training_is_the_same(flash: FlashAttention, tmp_path: Path) -> None:
    how = {"bf16": True, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(**pair(FLASH), **how, output_dir=str(tmp_path / "whole"))
    whole.train()
    resumed = make_trainer(**pair(FLASH), **how, output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-1"))
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_bridge(flash: FlashAttention) -> None:
    student, teacher = attending(bridge_student()), attending(bridge_teacher())
    logs, _ = one_step(make_bridge(model=student, teacher_model=teacher, bf16=True))
    assert logs["loss"] > 0 and set(flash.calls) == {BF16}


def test_outside_of_a_training_other_kernels_run(flash: FlashAttention, tmp_path: Path) -> None:
    """Measuring, caching and generating give what they give with SDPA, and the model keeps its attention."""
    blocks = torch.randint(6, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    models = {how: attending(tiny_teacher(), how) for how in ("sdpa", FLASH)}
    losses = [held_out_loss(model, blocks) for model in models.values()]
    assert losses[0] == losses[1]
    written = []
    for how, model in models.items():
        folder = tmp_path / how
        write_cache(model, token_dataset(3), folder / "cache", args=make_args(folder), kind="hidden")
        complete(folder / "text.jsonl", model)
        written.append(
            ([file.read_bytes() for file in sorted(folder.rglob("rows-*"))], rows_of(folder / "text.jsonl"))
        )
    assert written[0] == written[1] and written[0][0]
    assert models[FLASH].config._attn_implementation == FLASH and not flash.calls


class _Spy(DistillTrainer):
    """Notes how its models attend."""

    seen: list[list[str]] = []

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.append([model.config._attn_implementation for model in (self.model, self.teacher_model)])
        return super().train(*args, **kwargs)


@pytest.mark.parametrize("given", ["in memory", "by name"])
def test_a_chain_is_built_with_it(
    flash: FlashAttention, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    """The source, the students, their teachers and the hybrids between them, in depth and in width."""
    monkeypatch.setattr(build_module, "DistillTrainer", _Spy)
    monkeypatch.setattr(_Spy, "seen", [])
    start: Any = attending(chain_source())
    options: dict[str, Any] = {}
    if given == "by name":
        start.save_pretrained(tmp_path / "source")
        start, options = str(tmp_path / "source"), {"model_init_kwargs": {"attn_implementation": FLASH}}
    chain = build_chain(
        start,
        CHAIN_ANCHORS,
        dataset=chain_rows(),
        output_dir=tmp_path / "chain",
        args=chain_config(bf16=True, max_steps=1, save_strategy="no", **options),
        processing_class=tiny_tokenizer(),
        calibration_tokens=128,
    )
    assert _Spy.seen == [[FLASH, FLASH]] * len(CHAIN_ANCHORS)
    assert flash.calls and set(flash.calls) == {BF16}
    made: Any = from_chain(chain, config=WIDE)
    assert made.config._attn_implementation == "sdpa"
    made.set_attn_implementation(FLASH)
    with torch.autocast("cpu", BF16):
        assert made(torch.zeros(1, 4, dtype=torch.long)).logits.isfinite().all()


def test_a_chain_with_a_bridge(flash: FlashAttention, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Across tokenizers, and below it in the attention of the model that was bridged to."""
    monkeypatch.setattr(build_module, "DistillTrainer", _Spy)
    monkeypatch.setattr(_Spy, "seen", [])
    bridge = bridge_step(model=attending(anchor_zero()), args=bridge_config(bf16=True, max_steps=1))
    args = chain_config(bf16=True, max_steps=1)
    build_bridged(tmp_path / "chain", source=attending(source()), bridge=bridge, args=args)
    assert _Spy.seen == [[FLASH, FLASH]] and set(flash.calls) == {BF16}
