"""Caches on users' disks stay readable."""

import pytest
import torch

from cbd_trl.cache import TeacherCache
from cbd_trl.cache.format import read_manifest, write_manifest
from tests.cache.helpers import direct_log_probs, token_dataset
from tests.stored import CACHES, KINDS, stored_teacher
from tests.tokenizer import tiny_tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_cache_is_verified_and_read(kind):
    cache, model = TeacherCache.open(CACHES / kind, verify=True), stored_teacher()
    cache.check(vocabulary_rows=64, tokenizer=tiny_tokenizer())
    rows = token_dataset()["input_ids"]
    cache.check_rows(rows)
    for row in rows:
        found, expected = cache.lookup(row), direct_log_probs(model, row)
        if kind == "hidden":
            found_log_probs = torch.log_softmax(cache.head().logits(found.hidden.float()), -1)
            torch.testing.assert_close(found_log_probs, expected, atol=0.02, rtol=0.02)
        else:
            kept = expected.gather(1, found.indices.long())
            torch.testing.assert_close(found.log_probs, kept, atol=1e-3, rtol=1e-3)
        target = expected.gather(1, torch.tensor(row[1:])[:, None])[:, 0]
        torch.testing.assert_close(found.target, target, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_manifest_is_written_as_it_was_read(kind, tmp_path):
    write_manifest(tmp_path, read_manifest(CACHES / kind))
    assert (tmp_path / "cache.json").read_text() == (CACHES / kind / "cache.json").read_text()
