"""Hostile chain.json, and why each is refused. A new case: one line."""

import json

from tests.hostile.damages import (
    COMMIT,
    DEEP,
    Case,
    anchor,
    blocks,
    body,
    lists,
    other_weights,
    pinned,
    planted,
    raw,
    replaced,
    swapped,
    swapped_anchors,
    twice,
    without_weights,
)
from tests.hostile.victim import SMALL

NO_NAME, LEAVES = r"anchors\[1\]\.name: ", "may lie outside"
BAD_PIN = r"anchors\[1\]\.repo\."

NAMES = {
    "up": "../large",
    "absolute": "/etc",
    "dots": "..",
    "dot": ".",
    "windows": "a\\b",
    "drive": "C:x",
    "share": "\\\\host\\a",
    "hidden": ".git",
    "empty": "",
    "control": "a\nb",
    "nul": "a\0b",
    "escape": "\x1b[2J",
    "unicode": "l\u0430rge",
    "surrogate": "\ud800",
    "long": "a" * 300,
    "manifest": "Chain.json",
    "home": "~",
    "percent": "%2e%2e",
    "trailing-dot": "large.",
    "space": "large ",
    "stream": "large:x",
}
FILES = {
    "up": "../large/model.safetensors",
    "deep-up": "a/../../x.json",
    "absolute": "/etc/passwd",
    "windows": "..\\x.json",
    "drive": "C:/x.json",
    "empty-part": "a//x.json",
    "nul": "x\0.json",
    "wildcard": "*.json",
    "hidden": ".ssh/id.json",
    "home": "~/x.json",
    "control": "a\r\n.json",
}
REPOS = {
    "up": "../up",
    "absolute": "/etc/x",
    "address": "https://evil.example/x",
    "windows": "a\\b",
    "bare": "gpt2",
    "deep": "a/b/c",
    "query": "a/b?x=1",
    "dots": "a/..",
    "separator": "a/b--c",
    "control": "a/b\n",
    "credentials": "u@h/x",
}
REVISIONS = {
    "branch": "main",
    "short": COMMIT[:7],
    "capitals": "A" * 40,
    "path": "../" * 13 + "x",
    "newline": COMMIT[:-1] + "\n",
    "number": int(COMMIT),
    "null": None,
    "pull": "refs/pr/1",
}

MANIFESTS = [
    # Not JSON, or not one JSON.
    Case("empty", raw(b""), "cannot be read"),
    Case("not-utf8", raw(b'{"schema_version": 5, "model_type": "\xff"}'), "cannot be read"),
    Case("utf16", raw('{"schema_version": 5}'.encode("utf-16")), "cannot be read"),
    Case("zeros", raw(bytes(4096)), "cannot be read"),
    Case("deep-object", raw(DEEP), "nested too deeply"),
    Case("deep-array", raw(b"[" * 100_000 + b"]" * 100_000), "nested too deeply"),
    Case("deep-training", anchor(training=json.loads(DEEP[: 5 * 60] + b"1" + b"}" * 60)), "nested too deeply"),
    Case("huge", raw(b'"' + b"x" * 2**24 + b'"'), "bytes are more than the"),
    Case("array", raw(b"[]"), "must hold a JSON object, got list"),
    Case("text", raw(b'"chain"'), "must hold a JSON object, got str"),
    Case("null", raw(b"null"), "must hold a JSON object, got NoneType"),
    Case("two-values", raw(b"{}{}"), "cannot be read"),
    Case(
        "key-twice", replaced('"name": "large"', '"name": "large", "name": "small"'), "the key 'name' is there twice"
    ),
    Case("top-key-twice", replaced("{", '{"schema_version": 5,'), "the key 'schema_version' is there twice"),
    Case("nan", replaced('"ce": 2.5', '"ce": NaN'), "the number NaN is not finite"),
    Case("infinity", replaced('"ce": 2.5', '"ce": -Infinity'), "the number -Infinity is not finite"),
    Case("overflow", replaced('"ce": 2.5', '"ce": 1e999'), "the number 1e999 is not finite"),
    Case("huge-int", replaced('"tokens_seen": 0', f'"tokens_seen": {"9" * 5000}'), "a number of 5000 digits"),
    # Other versions and types.
    Case("newer", body(schema_version=99), "has schema_version 99; this version of cbd-trl reads 5"),
    Case("version-text", body(schema_version="5"), "has schema_version '5'"),
    Case("version-object", body(schema_version={"a": [1] * 10_000}), "has schema_version {'a': .*}"),
    Case("version-float", body(schema_version=5.0), "has schema_version 5.0"),
    Case("anchors-object", body(anchors={}), r"anchors: .*got \{\}"),
    Case("anchors-empty", body(anchors=[]), "must list at least one anchor"),
    Case("anchor-text", body(anchors=["large"]), r"anchors\[0\]: .*got 'large'"),
    Case("versions-list", body(versions=[]), r"versions: .*got \[\]"),
    Case("model-type-number", body(model_type=3), "model_type: .*got 3"),
    Case("model-type-path", body(model_type="../../x"), r"is of model type 'llama', .*says '../../x'"),
    Case("extra-key", body(__class__="os.system"), "__class__: there is no field"),
    Case("extra-anchor-key", anchor(path="/etc"), "path: there is no field"),
    Case("prepare-key", anchor(prepare="os.system"), "prepare: there is no field"),
    Case("fetch-key", anchor(fetch="os.system"), "fetch: there is no field"),
    Case("bool-for-int", anchor(tokens_seen=True), "tokens_seen: .*got True"),
    Case("text-for-bool", anchor(finished="yes"), "finished: .*got 'yes'"),
    Case("name-null", anchor(name=None), "name: .*got None"),
    Case("negative-parameters", anchor(num_parameters=-1), "num_parameters: .*got -1"),
    Case("overflowing-tokens", anchor(tokens_seen=2**63), "tokens_seen: .*got 92"),
    Case("no-such-dtype", anchor(dtype="__class__"), "dtype: .*'__class__'"),
    Case("dtype-of-torch", anchor(dtype="load"), "dtype: .*'load'"),
    Case("huge-shape", anchor(shape={"num_hidden_layers": 2**40}), "shape.num_hidden_layers: .*got 1099"),
    Case("zero-shape", anchor(shape={"hidden_size": 0}), "shape.hidden_size: .*got 0"),
    Case("other-shape", anchor(shape={"hidden_size": 16}), "has the shape .* records"),
    Case("losses-text", anchor(losses={"ce": "2.5"}), "losses.ce: .*got '2.5'"),
    Case("tokenizer-path", anchor(tokenizer_sha256="../x"), "tokenizer_sha256: .*got '../x'"),
    Case("tokenizer-other", anchor(tokenizer_sha256="0" * 64), "different tokenizers|another tokenizer"),
    Case("power-text", anchor(training={"alpha_power": "x"}), "training.alpha_power must be a number .*, got 'x'"),
    Case("power-negative", anchor(training={"alpha_power": -1}), "training.alpha_power must be a number .*, got -1"),
    Case("runs-text", anchor(training={"consolidation": "x"}), "training.consolidation must be a list of .*, got 'x'"),
    Case("bridge-text", anchor(training={"bridge": "x"}), "training.bridge must be an object, got 'x'"),
    # Blocks that are not there.
    Case("block-map-null", anchor(blocks=None), "has a parent but no blocks"),
    Case("block-map-flat", anchor(blocks=[0, 1, 2, 3]), r"blocks\[0\]: .*got 0"),
    Case("block-beyond", anchor(blocks=blocks([0], [1], [2], [99])), "The block map must split"),
    Case("block-negative", anchor(blocks=blocks([0], [1], [2], [-1])), r"blocks\[3\].layers\[0\]: .*got -1"),
    Case("block-empty", anchor(blocks=[]), "The block map must split"),
    Case("block-without-layers", anchor(blocks=[{"layers": [], "kept": 0, "cost": None}]), "kept must be one of"),
    Case("block-too-many", anchor(blocks=blocks(*([i] for i in range(10**4)))), "must split"),
    Case(
        "kept-beyond", anchor(blocks=[*blocks([0], [1], [2]), {"layers": [3], "kept": 10**9}]), r"\[3\].kept: .*got 1"
    ),
    Case("cost-null", anchor(blocks=blocks([0], [1], [2], [3], costs=[0.0, None, 0.0, 0.0])), "a cost each, or none"),
    # Anchors that are others than they seem.
    Case("swapped-weights", swapped("model.safetensors"), "is damaged or was changed", without_hashes=False),
    Case("swapped-weights-2", swapped("model.safetensors"), "damaged or was changed|but config.json says"),
    Case("swapped-configs", swapped("config.json"), "damaged or was changed|has the shape"),
    Case("swapped-anchors", swapped_anchors, "has the shape .* records"),
    Case("swapped-tokenizers", planted("tokenizer.json", b"{}"), "cannot be read as a tokenizer"),
    Case("other-weights", other_weights, "is damaged or was changed", without_hashes=False),
    Case("twice", twice, "no name twice"),
    Case("parent-self", anchor(parent=SMALL), "has parent 'small', expected 'large'"),
    Case("parent-path", anchor(parent="../x"), r"has parent '\.\./x', expected 'large'"),
    Case("no-weights", without_weights, "files must list config.json and model.safetensors"),
    Case(
        "shards-of-both",
        planted("model-00001-of-00001.safetensors", b"x" * 64),
        "cannot be read as a safetensors file",
    ),
    Case("digest-number", lists("a.json", 0), r"files.'a.json': .*got 0"),
    Case("digest-capitals", lists("a.json", "A" * 64), r"files.'a.json': .*got 'AAA"),
    Case("missing", lists("a.json"), "is missing, but .* lists it"),
]
MANIFESTS += [Case(f"name-{name}", anchor(name=value), NO_NAME) for name, value in NAMES.items()]
MANIFESTS += [Case(f"file-{name}", lists(value), LEAVES) for name, value in FILES.items()]
MANIFESTS += [Case(f"repo-{name}", pinned(repo_id=value, revision=COMMIT), BAD_PIN) for name, value in REPOS.items()]
MANIFESTS += [
    Case(f"revision-{name}", pinned(repo_id="me/x", revision=value), BAD_PIN) for name, value in REVISIONS.items()
]
MANIFESTS += [
    Case("repo-text", anchor(repo="me/x"), r"anchors\[1\]\.repo: .*got 'me/x'"),
    Case("repo-more", pinned(repo_id="me/x", revision=COMMIT, path="../x"), BAD_PIN),
    Case("repo-less", pinned(repo_id="me/x"), BAD_PIN),
    Case("repo-not-here", pinned(repo_id="me/x", revision=COMMIT), "could not be fetched from the Hub"),
]
