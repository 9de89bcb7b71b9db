"""Which precision a run gets by default, and which is warned of: bf16 that a GPU emulates, weights in 16 bits."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from cbd_trl import DistillConfig, build_chain
from cbd_trl.recipe.estimate import bf16_pays
from tests.chain.helpers import chain_config, chain_rows, chain_source
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer
from tests.trainers.runs import lora
from tests.training import OUTPUT, make_trainer

ROUNDED = "an update of less than about 0.2 % of a weight changes nothing"


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What cbd_trl warns of, each as often as it does."""
    found: list[str] = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda self, message: found.append(message))
    return found


def _gpu(monkeypatch: pytest.MonkeyPatch, major: int) -> None:
    """Let torch find a GPU of this compute capability, such as a T4 (7) or an A100 (8)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    native = major > 7
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native
    )
    # The GPU is not there to be set up.
    monkeypatch.setattr(DistillConfig, "device", torch.device("cpu"))


@pytest.mark.parametrize(
    ("major", "given", "bf16", "warned"),
    [
        (7, {}, False, "Tesla T4 has no bf16"),
        (7, {"fp16": True}, False, None),
        (7, {"bf16": True}, True, "bf16=True, but Tesla T4"),
        (7, {"bf16": False}, False, None),
        (8, {}, True, None),
        (8, {"bf16": True}, True, None),
    ],
)
def test_bf16_by_default(
    monkeypatch: pytest.MonkeyPatch,
    warnings: list[str],
    major: int,
    given: dict[str, Any],
    bf16: bool,
    warned: str | None,
) -> None:
    _gpu(monkeypatch, major)
    assert DistillConfig(OUTPUT, report_to="none", **given).bf16 is bf16
    assert bf16_pays() is (major > 7)
    assert [message.startswith(warned or "") for message in warnings] == [True] * bool(warned)


def test_a_cpu_is_not_asked_for_its_gpu(monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    _gpu(monkeypatch, 7)
    assert DistillConfig(OUTPUT, report_to="none", use_cpu=True).bf16 and not warnings


@pytest.mark.parametrize(
    ("student", "how", "count"),
    [
        (torch.bfloat16, {}, 1),
        (torch.float32, {"bf16": True}, 0),
        # The adapter is in float32, and the base is not trained.
        (torch.bfloat16, {"peft_config": lora()}, 0),
    ],
)
def test_weights_in_16_bits(warnings: list[str], student: torch.dtype, how: dict[str, Any], count: int) -> None:
    make_trainer(student=tiny_model("llama", num_hidden_layers=2).to(student), **how)
    assert [ROUNDED in message for message in warnings] == [True] * count


@pytest.mark.parametrize("given", ["in memory", "by name"])
def test_a_build_warns_before_its_work(
    monkeypatch: pytest.MonkeyPatch, warnings: list[str], tmp_path: Path, given: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        assert len(warnings) == 1 and ROUNDED in warnings[0]
        raise KeyboardInterrupt

    source: Any = chain_source()
    options: dict[str, Any] = {}
    if given == "by name":
        source.save_pretrained(tmp_path / "source")
        source, options = tmp_path / "source", {"model_init_kwargs": {"dtype": "bfloat16"}}
    else:
        source.to(torch.bfloat16)
    monkeypatch.setattr("cbd_trl.build.build._make_source_anchor", fail)
    with pytest.raises(KeyboardInterrupt):
        build_chain(
            source,
            [4e-1],
            dataset=chain_rows(),
            output_dir=tmp_path / "chain",
            args=chain_config(**options),
            processing_class=tiny_tokenizer(),
        )
