"""Licenses are carried over, and never made up: what is missing, unknown or in conflict is said."""

import pytest
from huggingface_hub import snapshot_download

from cbd_trl.cards.metadata import card_metadata, license_sentence
from cbd_trl.cards.origin import Origin, origin_of, read_origins

LINKS = [f"https://huggingface.co/org/{name}/blob/0/LICENSE" for name in "ab"]
A, B = (
    Origin(f"org/{name}", (f"org/{name}",), license="apache-2.0", license_link=link)
    for name, link in zip("ab", LINKS, strict=True)
)
OWN = {"license": "other", "license_name": "own-1.0"}


def stated(*origins):
    data = card_metadata(origins, name="model").to_dict()
    return {key: value for key, value in data.items() if key.startswith("license")}


@pytest.mark.parametrize(
    ("origins", "fields", "said"),
    [
        ([A], {"license": "apache-2.0", "license_link": LINKS[0]}, "carried over from `org/a`."),
        # Each links to a copy of its own; it is one license all the same.
        ([A, B], {"license": "apache-2.0"}, "`apache-2.0`: carried over from `org/a`, `org/b`."),
        ([Origin("x", **OWN, license_link=LINKS[0])], {**OWN, "license_link": LINKS[0]}, f"`own-1.0`, `{LINKS[0]}`"),
        ([], {}, "None is stated: the source of this model is not known."),
        ([Origin("x")], {}, "None is stated, because none was found with the source, `x`."),
        ([Origin("x", license="unknown")], {}, "None is stated, because none was found with the source, `x`."),
        # Whether the Hub knows an identifier is for the Hub to say.
        ([Origin("x", license="my-own")], {"license": "my-own"}, "`my-own`: carried over from `x`."),
        ([Origin("x", license="my own")], {}, "`my own` (`x`). None is stated above, because that is not one ident"),
        ([Origin("x", license="mit, gpl")], {}, "`mit, gpl` (`x`). None is stated above, because that is not one"),
        ([Origin("x", license="other")], {}, "`other` (`x`). None is stated above, because that is not one ident"),
        (
            [A, Origin("x", license="mit")],
            {"license": "other", "license_name": "apache-2.0-and-mit"},
            "`apache-2.0` (`org/a`), `mit` (`x`). `other` is stated above, because they are not the same. Look all",
        ),
        (
            [B, A, Origin("x", **OWN)],
            {"license": "other", "license_name": "apache-2.0-and-own-1.0"},
            "`apache-2.0` (`org/b`), `apache-2.0` (`org/a`), `other`, `own-1.0` (`x`). `other` is stated above",
        ),
        ([A, Origin("x")], {}, "`nothing` (`x`). None is stated above, because they are not the same."),
        # Two models by one name.
        (
            [Origin("x", license="mit"), Origin("x", license="gpl")],
            {"license": "other", "license_name": "mit-and-gpl"},
            "`mit` (`x`), `gpl` (`x`). `other` is stated",
        ),
        ([A, Origin("x", license="mit, gpl")], {}, "`mit, gpl` (`x`). None is stated above, because they are not the"),
        ([A, Origin("x", license="unknown")], {}, "`unknown` (`x`). None is stated above, because they are not the"),
        # Everybody may call a license "own".
        ([Origin(name, **OWN, license_link=link) for name, link in zip("xy", LINKS, strict=True)], {}, "not the same"),
    ],
)  # fmt: skip
def test_what_is_said_of_licences(origins, fields, said):
    assert stated(*origins) == fields
    sentence = license_sentence(origins)
    assert said in sentence
    one = len({(origin.license, origin.license_name) for origin in origins}) == 1
    assert ("Look " in sentence) == (not fields or not one)


def folder_with(tmp_path, card):
    folder = tmp_path / "some-model"
    folder.mkdir()
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


@pytest.mark.parametrize(
    ("card", "known"),
    [
        (None, {}),
        ("No metadata.", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\n- a list\n---\n", {}),
        (f"---\nlicense: {'[' * 400}\n---\n", {}),
        ("---\nlicense: 3\nbase_model: 4\n---\n", {}),
        ("---\nlicense: Apache-2.0\n---\n", {"license": "apache-2.0"}),
        ("---\nlicense: [mit]\nbase_model: org/one\n---\n", {"license": "mit", "base_models": ("org/one",)}),
        ("---\nlicense: [mit, gpl]\n---\n", {"license": "mit, gpl"}),
        ("---\nbase_model: [org/one, ../there, /home/it, org/two]\n---\n", {"base_models": ("org/one", "org/two")}),
        # In the form of an id, and a folder here.
        ("---\nbase_model: runs/before\n---\n", {}),
        # Nobody copies the file that it means.
        ("---\nlicense: other\nlicense_name: own-1.0\nlicense_link: LICENSE\n---\n", OWN),
        ("---\nlicense: mit\nlicense_link: 'javascript:alert(1)'\n---\n", {"license": "mit"}),
    ],
)  # fmt: skip
def test_what_the_card_in_a_folder_says(tmp_path, monkeypatch, card, known):
    (tmp_path / "runs" / "before").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert origin_of(folder_with(tmp_path, card)) == Origin("some-model", **known)


def test_a_model_on_the_hub_and_in_its_cache(hub, tmp_path):
    card = "---\nlicense: other\nlicense_name: own-1.0\nlicense_link: LICENSE\n---\n"
    folder = folder_with(tmp_path, card)
    (folder / "config.json").write_text("{}")
    commit = hub.commit("org/own", folder, "main")
    assert origin_of("org/own") == Origin()  # not loaded yet: a name like any other
    place = snapshot_download("org/own", allow_patterns=["config.json"])
    link = f"https://huggingface.co/org/own/blob/{commit}/LICENSE"
    expected = Origin("org/own", ("org/own",), commit, **OWN, license_link=link)
    for name in ("org/own", place):
        assert origin_of(name) == expected


def test_a_card_that_does_not_come_is_no_error(hub, tmp_path, monkeypatch):
    folder = folder_with(tmp_path, None)
    (folder / "config.json").write_text("{}")
    commit = hub.commit("org/bare", folder, "main")
    snapshot_download("org/bare", allow_patterns=["config.json"])
    assert origin_of("org/bare") == Origin("org/bare", ("org/bare",), commit)

    def broken(*_, **__):
        raise RuntimeError("a connection that breaks in a library's own way")

    monkeypatch.setattr("cbd_trl.cards.origin.hf_hub_download", broken)
    assert origin_of("org/bare") == Origin("org/bare", ("org/bare",), commit)


def test_records_come_back_and_nonsense_is_not_known():
    assert read_origins([A.record(), Origin().record()]) == (A, Origin())
    assert read_origins("nonsense") == read_origins(None) == ()
    assert read_origins([3, {"name": ["x"], "license": {}, "base_models": ["../up", 3, "org/a"], "more": 1}]) == (
        Origin(),
        Origin(name="x", base_models=("org/a",)),
    )


def test_names_that_are_no_ids_are_left_out():
    names = ["org/a", "/home/a", "a/b/c", "../up", "org/a"]
    data = card_metadata([Origin("x", tuple(names))], name="model", datasets=names, before=["runs\\one"]).to_dict()
    assert data["base_model"] == data["datasets"] == ["org/a"]


def test_a_merge_needs_two_models_and_a_relation_needs_one():
    assert card_metadata([A, B], relation="merge", name="model").base_model_relation == "merge"
    assert card_metadata([A], relation="merge", name="model").base_model_relation == "finetune"
    assert "base_model_relation" not in card_metadata([Origin("x")], relation="merge", name="model").to_dict()


@pytest.mark.parametrize("tag", ["", 3, None])
def test_tags_are_names(tag):
    with pytest.raises(ValueError, match=f"tags.*{tag!r}"):
        card_metadata([A], name="model", tags=["fine", tag])


def test_a_link_is_an_address():
    for link in ("C:/LICENSE", "LICENSE", "javascript:alert(1)"):
        assert read_origins([{"name": "x", "license": "mit", "license_link": link}])[0].license_link is None
