"""Every hostile teacher cache is refused by name, and nothing around it is read or written."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from cbd_trl.cache import TeacherCache, write_cache
from cbd_trl.cache.format import Manifest, Settings
from tests.cache.helpers import make_args, token_dataset
from tests.hostile.damages import DEEP
from tests.hostile.headers import HEADERS
from tests.hostile.surroundings import snapshot, untouched
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer

SHARD = "rows-00000.safetensors"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "cache"
    write_cache(
        tiny_model("llama"), token_dataset(), folder, args=make_args(folder), k=4, processing_class=tiny_tokenizer()
    )
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def folder(written, tmp_path):
    """A copy, and another one outside."""
    for name in ("outside", "cache"):
        (tmp_path / name).mkdir()
        for file, content in written.items():
            (tmp_path / name / file).write_bytes(content)
    return tmp_path / "cache"


def use(folder):
    cache = TeacherCache.open(folder)
    return [cache.lookup(row) for row in token_dataset()["input_ids"]]


def top(**values):
    return lambda body: body.update(values)


def settings(**values):
    return lambda body: body["settings"].update(values)


def shard(**values):
    return lambda body: body["shards"][0].update(values)


MANIFESTS = [
    (top(format_version=[1] * 1000), r"has format_version \[1, 1"),
    (top(settings=[]), r"settings: .*got \[\]"),
    (top(shards={}), r"shards: .*got \{\}"),
    (top(shards=[3]), r"shards\[0\]: .*got 3"),
    (top(extra=1), "extra: there is no field of this name"),
    (top(highest_token_id="63"), "highest_token_id: .*got '63'"),
    (top(highest_token_id=10**9), "highest_token_id must be below vocabulary_rows=64, got 1000000000"),
    (top(complete=1), "complete: .*got 1"),
    (top(expected_rows=-1), "expected_rows: .*got -1"),
    (top(head_sha256="x"), "head_sha256: .*got 'x'"),
    (settings(kind="pickle"), "settings.kind: .*got 'pickle'"),
    (settings(kind="hidden"), "settings: hidden_size, hidden_dtype must be given"),
    (settings(kind="hidden", hidden_size=8, hidden_dtype="load"), "hidden_dtype: .*got 'load'"),
    (settings(k=None), "settings: k must be given"),
    (settings(k=2**40), "settings.k: .*got 1099"),
    (settings(k="4"), "settings.k: .*got '4'"),
    (settings(temperature=0), "settings.temperature: .*got 0"),
    (settings(value_bits=8), "settings.value_bits: .*got 8"),
    (settings(vocabulary_rows=-64), "settings.vocabulary_rows: .*got -64"),
    (settings(vocabulary_rows=2**40), "settings.vocabulary_rows: .*got 1099"),
    (shard(file="../outside/" + SHARD), "a shard lies outside the folder"),
    (shard(file="/etc/passwd"), "a shard lies outside the folder"),
    (shard(file=".."), "a shard lies outside the folder"),
    (shard(file="..\\" + SHARD), "a shard lies outside the folder"),
    (shard(file="rows-00000.bin"), "a shard lies outside the folder"),
    (shard(file=3), r"shards\[0\].file: .*got 3"),
    (shard(rows="12"), r"shards\[0\].rows: .*got '12'"),
    (shard(rows=10**6), r"shards\[0\]: rows must be at most tokens, got 1000000"),
    (shard(tokens=-1), r"shards\[0\].tokens: .*got -1"),
    (shard(tokens=2**70), r"shards\[0\].tokens: .*got 1180"),
    (shard(sha256="../x"), r"shards\[0\].sha256: .*got '../x'"),
    (lambda body: body["shards"].append(body["shards"][0]), "a shard is listed twice"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), MANIFESTS, ids=range(len(MANIFESTS)))
def test_a_hostile_manifest_is_refused(folder, change, message):
    body = json.loads((folder / "cache.json").read_text())
    change(body)
    (folder / "cache.json").write_text(json.dumps(body))
    refused(folder, message)


@pytest.mark.parametrize("field", [*Manifest.model_fields, *(f"settings.{name}" for name in Settings.model_fields)])
def test_no_field_may_be_left_out(folder, field):
    body = json.loads((folder / "cache.json").read_text())
    *outer, name = field.split(".")
    (body[outer[0]] if outer else body).pop(name)
    (folder / "cache.json").write_text(json.dumps(body))
    refused(folder, rf"{field}: the field is missing|kind|{field}")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", DEEP, b'{"format_version": 1, "format_version": 1}', b"[NaN]"])
def test_what_is_no_json_is_refused(folder, content):
    (folder / "cache.json").write_bytes(content)
    refused(folder, "cannot be read")


@pytest.mark.parametrize("name", ["cache.json", SHARD])
def test_a_link_out_is_refused(folder, name):
    (folder / name).unlink()
    os.symlink(f"../outside/{name}", folder / name)
    refused(folder, "is a link that leaves")


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_header_is_refused(folder, name):
    content = HEADERS[name][0]
    (folder / SHARD).write_bytes(content)
    with_size(folder)
    refused(folder, r"cannot be read as a safetensors file|holds the arrays")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lengths", lambda old: -old, "the lengths of its rows do not add up"),
        ("lengths", lambda old: old * 0 + 2**60, "the lengths of its rows do not add up"),
        ("lengths", lambda old: old + 1, "the lengths of its rows do not add up"),
        ("ids_low", lambda old: old * 0 + 60_000, "it predicts token 60000, above"),
        ("tokens", lambda old: old * 0 - 1, "was changed: under the key of the row"),
    ],
)
def test_hostile_arrays_are_refused(folder, name, value, message):
    with safe_open(folder / SHARD, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no dict
    old = tensors[name]
    tensors[name] = value(old.to(torch.int64)).to(torch.int32).to(old.dtype) if name == "ids_low" else value(old)
    (folder / SHARD).write_bytes(save(tensors, metadata={"format": "pt"}))
    with_size(folder)
    refused(folder, message)


def with_size(folder):
    """cache.json has the size that the shard has now."""
    body = json.loads((folder / "cache.json").read_text())
    body["shards"][0]["num_bytes"] = (folder / SHARD).stat().st_size
    (folder / "cache.json").write_text(json.dumps(body))


def refused(folder, message):
    before = snapshot(folder.parent)
    with untouched(folder.parent / "outside"), pytest.raises(ValueError, match=message):
        use(folder)
    assert snapshot(folder.parent) == before


def test_the_good_cache_is_taken(folder):
    assert len(use(folder)) == len(token_dataset())
