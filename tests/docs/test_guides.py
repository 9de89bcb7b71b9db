"""Every command and every block of Python in the guides, followed from top to bottom on tiny models."""

import functools
from pathlib import Path

import pytest
from huggingface_hub import CommitInfo, constants
from transformers import TrainingArguments

from cbd_trl import Chain
from cbd_trl.recipe import estimate
from cbd_trl.recipe.memory import Phase
from cbd_trl.report import measure as chain_report
from tests.chain.hub_server import Hub, serving
from tests.docs.programs import Reader
from tests.docs.reading import ROOT, Step, guides, read_steps
from tests.docs.world import World, small_recipes

# Whatever a guide says of a training, here it is one step on the CPU.
_QUICK = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_length": 16,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


@pytest.fixture(scope="module", autouse=True)
def quick_training():
    """Every training of this file has the arguments of `_QUICK`, whoever makes its config."""
    original = TrainingArguments.__post_init__

    @functools.wraps(original)
    def quick(self):
        for name in _QUICK.keys() & vars(self).keys():
            setattr(self, name, _QUICK[name])
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingArguments, "__post_init__", quick)
        # A report reads 64 blocks, here of a few tokens.
        patch.setattr(chain_report, "_BLOCK_LENGTH", 8)
        # A dry run traces every phase of every anchor for this machine and for GPUs: tests/recipe has that.
        for phases in ("source_phases", "anchor_phases", "bridge_phases"):
            patch.setattr(estimate, phases, lambda *_: [Phase("train", 1)])
        # The benchmarks compare with a trainer of trl.experimental, whose import warns.
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory, quick_training):
    """The models, rows and chains of the guides, and a Hub on this machine."""
    folder = tmp_path_factory.mktemp("world")
    with serving(Hub()) as hub, pytest.MonkeyPatch.context() as patch:
        url = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "ENDPOINT", hub.address)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)

        def push(chain, repo_id, **options):
            commit = hub.commit(repo_id, chain.path, "main", "v1")
            return CommitInfo(f"{hub.address}/{repo_id}/commit/{commit}", "", "", commit)

        patch.setattr(Chain, "push_to_hub", push)
        recipes = small_recipes(folder / "recipes")
        patch.setattr("cbd_trl.recipe.schema._folder", lambda: recipes)
        yield World(folder, hub)


def _complaint(guide: Path, step: Step, error: BaseException) -> str:
    return (
        f"{guide.relative_to(ROOT)}:{step.line}: {step.text.strip().splitlines()[0]}\n"
        f"    {type(error).__name__}: {' '.join(str(error).split())[:600]}"
    )


@pytest.mark.parametrize("guide", guides(), ids=lambda guide: guide.stem)
def test_every_step_of_a_guide_works(guide, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reader, complaints = Reader(tmp_path, world), []
    for step in read_steps(guide.read_text()):
        try:
            reader.follow(step)
        except (Exception, SystemExit) as error:
            complaints.append(_complaint(guide, step, error))
    assert not complaints, (
        "\n".join(complaints) + "\nA model, file or variable that the tests lack: one line in INPUTS or VARIABLES of "
        "tests/docs/world.py. A program: PROGRAMS of tests/docs/programs.py; one that takes minutes: NOT_RUN there."
    )
