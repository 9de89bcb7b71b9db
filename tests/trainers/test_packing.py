import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    create_causal_mask,
    sdpa_mask,
)

from cbd_trl.trainers import packing
from cbd_trl.trainers.packing import NAME, RowMask, attention_within_rows, row_mask
from tests.tiny import FAMILIES, ROWS, SDPA_FAMILIES, tiny_model
from tests.training import assert_same_gradient, make_trainer, one_step, text_rows

LENGTHS = (5, 9, 1, 12)


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


def logits_and_gradient(
    model: PreTrainedModel, inputs: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradient of a function that feels each of them."""
    model.zero_grad()
    logits = model(**inputs).logits
    (logits * torch.linspace(-1, 1, logits.numel()).sin().view_as(logits)).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def row_by_row(model: PreTrainedModel, inputs: dict[str, Any], lengths: tuple[int, ...]) -> Any:
    """What packed rows must be: each of them alone."""

    class Apart(torch.nn.Module):
        zero_grad, named_parameters = model.zero_grad, model.named_parameters

        def forward(self, input_ids: torch.Tensor, **others: Any) -> Any:
            rows = [model(row, use_cache=False).logits for row in input_ids.split(lengths, dim=1)]
            return type("Output", (), {"logits": torch.cat(rows, dim=1)})

    return logits_and_gradient(Apart(), inputs)  # type: ignore[arg-type]


class Varlen:
    """Stands in for torch's varlen_attn: its arguments, its refusals but for the device, and SDPA's result."""

    def __init__(self, dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)) -> None:
        self.dtypes = dtypes
        self.windows: list[tuple[int, int]] = []
        self.lengths: list[int] = []

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if query.dtype not in self.dtypes or not query.dtype == key.dtype == value.dtype:
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        if query.shape[-1] % 8:
            raise RuntimeError("head_size must be a multiple of 8")
        assert cu_seq_q.dtype == torch.int32 and max_q == max_k == int(cu_seq_q.diff().max())
        assert enable_gqa and window_size[1] == 0 and query.dim() == 3
        self.windows.append(window_size)
        left, outputs = window_size[0], []
        for start, end in pairwise(cu_seq_q.tolist()):
            self.lengths.append(end - start)
            states = (state[None, start:end].transpose(1, 2) for state in (query, key, value))
            before = torch.arange(end - start)[:, None] - torch.arange(end - start)
            seen = (before >= 0) & ((before <= left) | (left < 0))
            output = torch.nn.functional.scaled_dot_product_attention(*states, seen, scale=scale, enable_gqa=True)
            outputs.append(output[0].transpose(0, 1))
        return torch.cat(outputs)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """No test sees what another has chosen."""
    packing._has_varlen.cache_clear()
    yield
    packing._has_varlen.cache_clear()


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch) -> Varlen:
    """On this processor, and in float32, where it can be compared exactly."""
    stand_in = Varlen((torch.float16, torch.bfloat16, torch.float32))
    monkeypatch.setattr(packing, "varlen_attn", stand_in)
    monkeypatch.setattr(packing, "_missing", lambda *choice: None)
    return stand_in


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of what SDPA attends over at once."""
    lengths: list[int] = []
    plain = packing.sdpa_attention_forward

    def count(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths.append(query.shape[2])
        return plain(module, query, *args, **kwargs)

    monkeypatch.setattr(packing, "sdpa_attention_forward", count)
    return lengths


def assert_rows_apart(family: str, lengths: tuple[int, ...]) -> None:
    """Logits and gradients under the model's own dense mask, and with attention within the rows."""
    model, inputs = tiny_model(family), packed_inputs(lengths)
    model.train()
    if family == "opt":  # under its dense mask packed rows see each other
        logits, gradient = row_by_row(model, inputs, lengths)
    else:
        logits, gradient = logits_and_gradient(model, inputs)
    with attention_within_rows([model]):
        assert model.config._attn_implementation == NAME
        found, found_gradient = logits_and_gradient(model, inputs)
    assert model.config._attn_implementation == "sdpa"
    assert (found - logits).abs().max() <= 1e-5 * logits.std()
    assert_same_gradient(found_gradient, gradient)


@pytest.mark.parametrize("lengths", [LENGTHS, (11,)], ids=str)
@pytest.mark.parametrize("family", [family for family in SDPA_FAMILIES if ROWS[family].packs])
def test_rows_by_themselves_are_the_packed_rows(family: str, lengths: tuple[int, ...], attended: list[int]) -> None:
    assert_rows_apart(family, lengths)
    assert attended == (list(lengths) if ROWS[family].row_bounds else [sum(lengths)]) * 4


@pytest.mark.parametrize(
    "family", [family for family in SDPA_FAMILIES if ROWS[family].row_bounds and ROWS[family].packs]
)
def test_varlen_attention_is_that_of_the_packed_rows(family: str, varlen: Varlen, attended: list[int]) -> None:
    assert_rows_apart(family, LENGTHS)
    assert varlen.lengths == list(LENGTHS) * 4 and not attended
    window = getattr(tiny_model(family).config, "sliding_window", None)
    assert {(-1, 0)} <= set(varlen.windows) | {(-1, 0)} and set(varlen.windows) <= {(-1, 0), ((window or 0) - 1, 0)}


@pytest.mark.parametrize("family", [family for family in FAMILIES if not ROWS[family].packs])
def test_packing_is_refused_where_a_layer_reads_across_rows(family: str) -> None:
    with pytest.raises(ValueError, match=r"can't keep packed sequences apart without|Packed rows see each other"):
        make_trainer(family, packing=True, max_length=20)


def test_layers_with_windows_tell_varlen_attention(varlen: Varlen) -> None:
    with attention_within_rows([model := tiny_model("gemma3_text")]):
        model(**packed_inputs(LENGTHS))
        assert varlen.windows == [(5, 0), (5, 0), (-1, 0), (5, 0)]
        varlen.windows.clear()
        model(**packed_inputs((3, 6)))  # no row is longer than the window of 6
        assert varlen.windows == [(-1, 0)] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_varlen_attention_gets_16_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, attended: list[int]
) -> None:
    """Qwen3 normalizes queries and keys, in float32: SDPA is cast by autocast, varlen_attn is not."""
    stand_in = Varlen()
    monkeypatch.setattr(packing, "varlen_attn", stand_in)
    monkeypatch.setattr(packing, "_missing", lambda *choice: None)
    model, inputs = tiny_model("qwen3"), packed_inputs(LENGTHS)
    with torch.autocast("cpu", dtype):
        expected = model(**inputs).logits
        with attention_within_rows([model]):
            found = model(**inputs).logits
    assert stand_in.windows and not attended
    assert (found - expected).norm() <= 3e-2 * expected.norm()


@pytest.mark.parametrize(
    ("options", "value_size"),
    [({"dropout": 0.5}, 8), ({"s_aux": torch.ones(4)}, 8), ({"position_bias": torch.zeros(1)}, 8), ({}, 4)],
    ids=["dropout", "sinks", "bias", "values of another size"],
)
def test_what_varlen_attention_lacks_is_done_one_by_one(
    options: dict[str, Any], value_size: int, varlen: Varlen, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def sdpa(module: Any, query: torch.Tensor, key: Any, value: torch.Tensor, mask: Any, **given: Any) -> Any:
        calls.append(given)
        return value.transpose(1, 2), None

    monkeypatch.setattr(packing, "sdpa_attention_forward", sdpa)
    query, value = torch.zeros(1, 4, 9, 8), torch.zeros(1, 4, 9, value_size)
    packing.attend_within_rows(None, query, query, value, None, (0, 4, 9), None, **options)
    assert calls == [options] * 2 and not varlen.windows
    packing.attend_within_rows(
        None, query, query, query, None, (0, 4, 9), torch.tensor((0, 4, 9), dtype=torch.int32), scaling=0.5
    )
    assert varlen.windows == [(-1, 0)]


def test_masks_with_chunks_are_attended_one_by_one(varlen: Varlen, attended: list[int]) -> None:
    """As in Llama 4: local, but no window."""
    torch.manual_seed(0)
    lengths, size = (3, 8), 4
    rows = torch.tensor([0] * 3 + [1] * 8)
    positions = torch.cat([torch.arange(n) for n in lengths])
    within = chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.long))

    def rule(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (rows[query] == rows[key]) & within(batch, head, positions[query], positions[key])

    made = row_mask(1, 11, 11, mask_function=rule, local_size=size, allow_is_causal_skip=False)
    assert isinstance(made, RowMask)
    query, key, value = torch.randn(3, 1, 2, 11, 8)
    found, _ = packing.attend_within_rows(None, query, key, value, made, (0, 3, 11))
    assert attended == [3, 8] and not varlen.windows
    dense, _ = packing.attend_within_rows(None, query, key, value, made)
    torch.testing.assert_close(found, dense)


@pytest.mark.parametrize("how", ["a rule of its own", "a mask made before"])
def test_a_mask_that_cannot_be_read_is_cut_into_blocks(how: str, varlen: Varlen, attended: list[int]) -> None:
    torch.manual_seed(0)
    model, inputs = tiny_model("llama"), packed_inputs(LENGTHS)
    positions = inputs["position_ids"]
    like = torch.zeros(1, positions.numel(), 0)

    def no_second(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return positions[batch, key] != 1

    model.set_attn_implementation(NAME if how == "a rule of its own" else "sdpa")
    mask = create_causal_mask(model.config, like, None, None, positions, and_mask_function=no_second)
    assert isinstance(mask, torch.Tensor)
    model.set_attn_implementation("sdpa")
    expected = model(**inputs | {"attention_mask": mask}).logits
    with attention_within_rows([model]):
        found = model(**inputs | {"attention_mask": mask}).logits
    assert not varlen.windows and attended == list(LENGTHS) * 4
    assert (found - expected).abs().max() <= 1e-5 * expected.std()


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    messages: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(packing.logger, level, lambda text, level=level: messages.append(f"{level}: {text}"))
    return messages


@pytest.fixture
def trial_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is tried on this processor, where there is no other."""
    plain = packing._try_varlen
    monkeypatch.setattr(packing, "_try_varlen", lambda device, *how: plain(torch.device("cpu"), *how))


@pytest.mark.usefixtures("trial_here")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_varlen_attention_is_chosen_where_it_runs(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    stand_in = Varlen()
    monkeypatch.setattr(packing, "varlen_attn", stand_in)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert all(packing._has_varlen(torch.device("cuda:0"), dtype, 8) for _ in range(3))
    assert len(stand_in.windows) == len(logged) == 1
    assert re.match(r"info: .* with torch.nn.attention.varlen.varlen_attn on cuda:0 in b?float16", logged[0])


def old_varlen(query: Any, key: Any, value: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, is_causal: bool) -> Any:
    """As in torch 2.10."""


def without_window(*args: Any, scale: Any = None, window_size: Any = None, enable_gqa: bool = False) -> Any:
    """A kernel that is wrong without a word."""
    return Varlen()(*args, scale=scale, window_size=(-1, 0), enable_gqa=True)


def other_gpu(*args: Any, scale: Any = None, window_size: Any = None, enable_gqa: bool = False) -> Any:
    """A kernel on a T4."""
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


@pytest.mark.usefixtures("trial_here")
@pytest.mark.parametrize(
    ("device", "dtype", "kernel", "why"),
    [
        ("cpu", torch.bfloat16, Varlen(), r"info: .* one by one with SDPA on cpu in bfloat16.*is for CUDA"),
        ("mps:0", torch.bfloat16, Varlen(), r"warning: .* on mps:0 .*is for CUDA"),
        ("cuda:0", torch.float32, Varlen(), r"warning: .* in float32 .*takes float16 and bfloat16.*train in bf16"),
        ("cuda:0", torch.bfloat16, None, r"warning: .*has no varlen_attn"),
        ("cuda:0", torch.bfloat16, old_varlen, r"warning: .*has no varlen_attn with scale"),
        ("cuda:0", torch.bfloat16, other_gpu, r"warning: .*does not run \(FlashAttention only supports Ampere"),
        ("cuda:0", torch.bfloat16, without_window, r"warning: .*% off SDPA"),
    ],
)
def test_rows_are_attended_one_by_one_elsewhere_and_it_is_said_why(
    device: str,
    dtype: torch.dtype,
    kernel: Callable[..., Any] | None,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    logged: list[str],
) -> None:
    monkeypatch.setattr(packing, "varlen_attn", kernel)
    assert not any(packing._has_varlen(torch.device(device), dtype, 8) for _ in range(3))
    assert len(logged) == 1 and re.match(why, logged[0]), logged


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


@pytest.mark.parametrize("family", SDPA_FAMILIES)
def test_one_row_without_bounds_is_attended_as_ever(family: str) -> None:
    """As in generation, where the row grows: a window is crossed."""
    model, ids = tiny_model(family), torch.arange(1, 10)[None] + 6
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    with attention_within_rows([model]):
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        alone = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=0, atol=1e-4)
    torch.testing.assert_close(alone, model(ids, use_cache=False).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_whose_packed_rows_see_each_other_is_refused(role: str) -> None:
    leaky = tiny_model("opt", seed=1, attn_implementation="eager")
    with pytest.raises(ValueError, match=r"see each other in OPTForCausalLM with attn_implementation='eager'.*=False"):
        make_trainer("opt", **{role: leaky}, packing=True, max_length=20)
    make_trainer("opt", **{role: leaky})
    make_trainer("opt", packing=True, max_length=20)


@pytest.mark.parametrize("kernel", ["varlen", "one by one"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_training_attends_within_rows_and_leaves_the_models_as_they_were(
    family: str, kernel: str, tmp_path: Path, attended: list[int], request: pytest.FixtureRequest
) -> None:
    """Training with checkpointing, hybrids and hidden states, and evaluation: the run under dense masks."""
    lengths = request.getfixturevalue("varlen").lengths if kernel == "varlen" else attended
    how = {"packing": True, "max_length": 30, "eval_dataset": text_rows(seed=5), "hidden_weight": 1.0}
    how |= {"gradient_checkpointing": True, "swap_probability": 1.0, "gradient_accumulation_steps": 2}
    how |= {"output_dir": str(tmp_path), "per_device_train_batch_size": 1}
    how |= {name: "steps" for name in ("save_strategy", "eval_strategy")} | {"save_steps": 1, "eval_steps": 1}
    rows = make_trainer(family, **how)
    logs, gradients = one_step(rows)
    assert lengths and max(lengths) <= 13  # the longest row and its eos, not the pack
    assert kernel == "one by one" or not attended
    for model in (rows.model, rows.teacher_model):
        assert model.config._attn_implementation == "sdpa"
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    assert saved.config._attn_implementation == "sdpa"
    assert NAME not in (tmp_path / "checkpoint-1/config.json").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "NAME", "sdpa")
        plain = make_trainer(family, **how)
        plain_logs, plain_gradients = one_step(plain)
    assert plain_logs["hybrid"] and logs == pytest.approx(plain_logs, rel=1e-4)
    ours, theirs = (trainer.state.log_history[1]["eval_loss"] for trainer in (rows, plain))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert_same_gradient(gradients, plain_gradients)


def test_rows_are_checked_as_they_are_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, where it is on, and with the bounds of their rows."""
    seen: list[tuple[bool, torch.dtype]] = []

    def look(query: torch.Tensor, *args: Any, **kwargs: Any) -> bool:
        seen.append((torch.is_autocast_enabled("cpu"), packing._product_dtype(query)))
        return False

    monkeypatch.setattr(packing, "_is_plain", look)
    make_trainer(packing=True, max_length=20, bf16=True)
    assert set(seen) == {(True, torch.bfloat16)}


def test_dense_masks_are_warned_of(logged: list[str]) -> None:
    eager, sdpa = (tiny_model("llama", seed=1, attn_implementation=name) for name in ("eager", "sdpa"))
    packing.warn_of_dense_masks([sdpa, sdpa], compiled=False)
    assert not logged
    packing.warn_of_dense_masks([eager, eager, sdpa], compiled=False)
    assert len(logged) == 1 and "attn_implementation='eager'" in logged[0]
    packing.warn_of_dense_masks([sdpa], compiled=True)
    assert len(logged) == 2 and "'sdpa' under torch_compile" in logged[1]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_compiled_model_is_not_given_numbers_that_change_with_every_pack(compiled: bool) -> None:
    backend = {"torch_compile_backend": "eager"} if compiled else {}
    trainer = make_trainer(packing=True, max_length=20, torch_compile=compiled, **backend)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch.get("row_bounds") == (None if compiled else tuple(batch["cu_seq_lens_q"].tolist()))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_left_alone_and_keeps_rows_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from transformers import masking_utils
    from transformers.integrations import flex_attention as integration

    # As they are, not compiled: what a GPU compiles in seconds takes a CPU minutes.
    monkeypatch.setattr(
        integration,
        "compile_friendly_flex_attention",
        lambda *args, training, **kwargs: flex_attention(*args, **kwargs),
    )
    monkeypatch.setattr(
        masking_utils, "create_block_mask", lambda **how: create_block_mask(**how | {"_compile": False})
    )
    flex, inputs = tiny_model("gemma3_text", attn_implementation="flex_attention"), packed_inputs(LENGTHS)
    expected = tiny_model("gemma3_text")(**inputs).logits
    with torch.no_grad(), attention_within_rows([flex]):
        assert flex.config._attn_implementation == "flex_attention"
        found = flex(**inputs).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.std()


def test_a_model_that_computes_with_its_mask_gets_the_dense_one() -> None:
    batch = {"batch_size": 1, "q_length": 6, "kv_length": 6, "mask_function": causal_mask_function}
    mask, dense = row_mask(**batch), sdpa_mask(**batch, allow_is_causal_skip=False)
    assert isinstance(mask, RowMask) and torch.equal(mask[..., :3, :3], dense[..., :3, :3])
    assert torch.equal(torch.where(mask, 1, 0), dense.long()) and mask.dtype == torch.bool
    assert torch.equal(mask.to("cpu"), dense)
