"""Two processes build the chain that one builds: anchor zero across vocabularies and the one below it; under FSDP.

They consolidate one as one process does, too.
"""

import itertools
from pathlib import Path

import pytest

from cbd_trl import Chain
from cbd_trl.surgery.statistics_file import StoredStatistics
from tests.build.bridged import anchor_zero
from tests.build.two_processes import BUILDS, build
from tests.processes import launch
from tests.surgery.helpers import logits


@pytest.mark.slow
@pytest.mark.parametrize("kind", BUILDS)
def test_two_processes_build_the_anchors_of_one(kind: str, tmp_path: Path) -> None:
    one = build(kind, tmp_path / "one", processes=1)
    launch("tests.build.two_processes", kind, str(tmp_path / "two"))
    two = Chain.from_pretrained(tmp_path / "two")
    assert len(two.anchors) == len(one.anchors) > 1 and not list(two.path.glob(".work*"))
    for ours, theirs in zip(two.anchors, one.anchors, strict=True):
        assert (ours.name, ours.parent, ours.block_map, ours.tokenizer_sha256, ours.tokens_seen) == (
            theirs.name, theirs.parent, theirs.block_map, theirs.tokenizer_sha256, theirs.tokens_seen
        )  # fmt: skip
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
        weights, expected = ours.load_state_dict(), theirs.load_state_dict()
        assert weights.keys() == expected.keys()
        for key, tensor in expected.items():
            assert (weights[key] - tensor).abs().max() < 1e-3, (ours.name, key)
        statistics, known = StoredStatistics(ours.statistics_file), StoredStatistics(theirs.statistics_file)
        assert statistics.tokens == known.tokens and statistics.sites == known.sites
    # Something was trained: what has no place in a cut is as it was, if nothing was.
    if kind == "bridged":
        before, after = logits(anchor_zero()), logits(two.source.load_model())
        assert (after - before).abs().max() > 0.1 * before.std()
    elif kind == "consolidated":
        for ours, theirs in zip(two.anchors[1:], Chain.from_pretrained(tmp_path / "source").anchors[1:], strict=True):
            assert (logits(ours.load_model()) - logits(theirs.load_model())).abs().max() > 0.01
    else:
        tables = [anchor.load_state_dict()["model.embed_tokens.weight"] for anchor in two.anchors]
        assert all((one - other).abs().max() > 1e-2 for one, other in itertools.pairwise(tables))
