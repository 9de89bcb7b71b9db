"""What a build tells while it trains: a line of progress per anchor, and the Trainer's logs to `report_to`."""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers.integrations import TensorBoardCallback, integration_utils

from cbd_trl import Chain
from tests.chain.bridged import bridge_config, bridge_step, build_bridged
from tests.chain.helpers import chain_config

TERMS = {"loss", "kd", "ce", "teacher_ce", "num_tokens"}


class _TensorBoard(TensorBoardCallback):
    """Writes what it is told to a file where the real one would."""

    def __init__(self) -> None:
        self.logging_dir: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.logging_dir = self.logging_dir or str(Path(args.output_dir) / "runs")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        assert self.logging_dir is not None
        Path(self.logging_dir).mkdir(parents=True, exist_ok=True)
        with (Path(self.logging_dir) / "events").open("a") as file:
            file.write(" ".join(logs) + "\n")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        pass


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Chain, str]:
    """A chain with a bridge, and what was printed while it was built."""
    folder = tmp_path_factory.mktemp("logs")
    how = {"disable_tqdm": False, "report_to": "tensorboard", "save_strategy": "no"}
    with pytest.MonkeyPatch.context() as patch, (folder / "out").open("w+") as out:
        patch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", _TensorBoard)
        patch.setattr("sys.stdout", out)
        bridge = bridge_step(args=bridge_config(**how))
        chain = build_bridged(folder / "chain", bridge=bridge, args=chain_config(**how))
    return chain, (folder / "out").read_text()


def test_each_anchor_has_a_line_of_progress(built: tuple[Chain, str]) -> None:
    chain, said = built
    for number, anchor in enumerate(chain.anchors, start=1):
        line = (
            rf"^{anchor.name} {number}/2 · step 3/3 · [\d,]+ tokens/s · 0 s left · "
            rf"ce {anchor.losses['ce']:.2f} \(teacher {anchor.losses['teacher_ce']:.2f}\)$"
        )
        assert re.search(line, said, re.MULTILINE), (line, said)


def test_the_logs_outlive_the_folder_of_the_checkpoints(built: tuple[Chain, str]) -> None:
    chain, _ = built
    for anchor in chain.anchors:
        *steps, last = (chain.path / "runs" / anchor.name / "events").read_text().splitlines()
        assert len(steps) >= 3 and all(set(line.split()) >= TERMS for line in steps[:3])
        assert "eval_kd" in last.split()
    assert not (chain.path / ".work").exists()
    assert [anchor.name for anchor in Chain.from_pretrained(chain.path).anchors] == [a.name for a in chain.anchors]
