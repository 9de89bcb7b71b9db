"""Every hostile chain is refused by name, at once, and nothing around it is read or written."""

import time

import pytest
import torch

from tests.hostile.damages import OUTSIDE
from tests.hostile.folders import FOLDERS
from tests.hostile.manifests import MANIFESTS
from tests.hostile.surroundings import snapshot, untouched
from tests.hostile.victim import seal, use

CASES = [*MANIFESTS, *FOLDERS]
# Of this process, so that a busy machine fails nothing.
_SECONDS = 5.0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_hostile_chain_is_refused(case, folder):
    case.damage(folder)
    before = snapshot(folder.parent)
    for verify in (True, False) if case.without_hashes else (True,):
        began = time.process_time()
        with untouched(folder.parent / OUTSIDE), pytest.raises((ValueError, OSError), match=rf"(?s){case.message}"):
            use(folder, verify)
        assert time.process_time() - began < _SECONDS
    assert snapshot(folder.parent) == before


def test_the_good_chain_is_taken_and_so_is_one_sealed_anew(original, folder):
    seal(folder)
    ours, theirs = use(folder), use(original)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_corpus_is_large_enough_and_no_case_stands_twice():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) >= 40
    assert len(MANIFESTS) >= 25


def test_an_opened_or_a_changed_file_is_found_out(folder):
    outside = folder.parent / OUTSIDE
    with pytest.raises(AssertionError, match=r"was opened: .*chain\.json|differ|=="), untouched(outside):
        (outside / "chain.json").write_bytes(b"")
