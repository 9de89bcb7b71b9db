"""What stands in front of a card for the Hub to read: only what is known, and only values that the Hub takes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

from cbd_trl.cards.card import code
from cbd_trl.cards.origin import Origin, hub_ids, is_hub_id
from cbd_trl.utils.formatting import did_you_mean

# How a model comes from its base models (https://huggingface.co/docs/hub/model-cards#specifying-a-base-model).
RELATIONS = ("finetune", "merge", "adapter", "quantized")
_LISTS = ("base_model", "datasets", "tags")
# Beside a card the Hub takes a licence under these names.
_LICENSE_FILES = ("LICENSE", "LICENSE.md")


def card_metadata(
    origins: Sequence[Origin],
    *,
    relation: str = "finetune",
    library: str = "transformers",
    name: str,
    datasets: Iterable[str] = (),
    tags: Iterable[str] = (),
    before: Iterable[str] = (),
) -> ModelCardData:
    """The metadata of a card, checked.

    Args:
        origins: the models it comes from; those on the Hub are its base models, the licence of all of them its own.
        relation: how it comes from them, one of `RELATIONS`; left out where none is on the Hub, and "finetune" where
            there is only one to merge.
        library: that loads it.
        name: of the model.
        datasets: names of what it was trained on; those that are no Hub ids are left out.
        tags: besides "cbd_trl" and "distillation".
        before: base models that come before those of the origins.
    """
    base = list(hub_ids([*before, *(base for origin in origins for base in origin.base_models)]))
    if relation == "merge" and len(base) == 1:
        relation = "finetune"
    known: dict[str, Any] = {
        **_license_fields(origins),
        "library_name": library,
        "pipeline_tag": "text-generation",
        "model_name": name,
        "base_model": base or None,
        "base_model_relation": relation if base else None,
        "datasets": list(hub_ids(datasets)) or None,
        "tags": [*dict.fromkeys(["cbd_trl", "distillation", *tags])],
    }
    data = ModelCardData(**known)
    check_metadata(data.to_dict())
    return data


def license_sentence(origins: Sequence[Origin]) -> str:
    """Which licence holds, or why none is stated."""
    sources = ", ".join(dict.fromkeys(code(origin.label) for origin in origins))
    if not origins:
        return (
            "None is stated: the source of this model is not known. Look its licence up before you share this model."
        )
    if fields := _license_fields(origins):
        extra = "".join(f", {code(fields[key])}" for key in ("license_name", "license_link") if key in fields)
        return f"{code(fields['license'])}{extra}: carried over from {sources}."
    if all(origin.license in (None, NO_LICENSE) for origin in origins):
        return (
            f"None is stated, because none was found with the source, {sources}. Look it up there before you share "
            "this model."
        )
    said = ", ".join(dict.fromkeys(f"{_terms(origin)} ({code(origin.label)})" for origin in origins))
    one = len({_stated(origin) for origin in origins}) == 1
    reason = "that does not name one that the Hub knows" if one else "they are not the same"
    return (
        f"Of the licence is said: {said}. None is stated above, because {reason}. Look it up before you share this "
        "model."
    )


def check_metadata(data: Mapping[str, Any]) -> None:
    """Refuse what the Hub would refuse, or show as something that it is not; without asking it.

    Args:
        data: the metadata of a card.

    Raises:
        ValueError: naming the field and its value.
    """
    for key in _LISTS:
        value = data.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            raise ValueError(f"{key} of a card must be a list of names, got {value!r}. Write one name as [name].")
    for key in ("base_model", "datasets"):
        for name in data.get(key, []):
            if not is_hub_id(name):
                raise ValueError(
                    f"{key} of a card names {name!r}, which is no Hub id ('owner/name'): readers of the card can not "
                    "follow a path. Leave it out."
                )
    license, relation = data.get("license"), data.get("base_model_relation")
    if license is not None and license not in LICENSES:
        raise ValueError(
            f"license {license!r} of a card is none of the Hub's identifiers.{did_you_mean(license, LICENSES)} Use "
            "one of https://huggingface.co/docs/hub/repositories-licenses, or 'other' with license_name and "
            "license_link."
        )
    if license == "other" and not data.get("license_name"):
        raise ValueError("license 'other' of a card needs a license_name: without it nobody knows which is meant.")
    link = data.get("license_link")
    if link is not None and link not in _LICENSE_FILES and not str(link).startswith(("http://", "https://")):
        raise ValueError(
            f"license_link {link!r} of a card is neither an address nor {' or '.join(_LICENSE_FILES)}, a file beside "
            "the card. Give one of these, or leave it out."
        )
    if relation is not None and relation not in RELATIONS:
        raise ValueError(
            f"base_model_relation {relation!r} of a card is not one of {', '.join(RELATIONS)}."
            f"{did_you_mean(relation, RELATIONS)}"
        )
    needed = {None: 0, "merge": 2}.get(relation, 1)
    if len(base := data.get("base_model", [])) < needed:
        raise ValueError(
            f"base_model_relation {relation!r} of a card needs {needed} or more of base_model, got {base}: name them, "
            "or leave the relation out."
        )


def _license_fields(origins: Sequence[Origin]) -> dict[str, str]:
    """The licence of all origins; empty where they state none, several or one that the Hub does not know."""
    if len({_stated(origin) for origin in origins}) != 1:
        return {}
    license = origins[0].license
    if license not in LICENSES or license == NO_LICENSE or (license == "other" and not origins[0].license_name):
        return {}
    known = {"license": license}
    for key in ("license_name", "license_link"):
        # Several models of one licence each link to a copy of their own.
        values = {getattr(origin, key) for origin in origins}
        if len(values) == 1 and (value := values.pop()) is not None:
            known[key] = value
    return known


def _stated(origin: Origin) -> tuple[str | None, ...]:
    """What has to be the same for two licences to be one: where it is called "other", its name and its link too."""
    if origin.license == "other":
        return (origin.license, origin.license_name, origin.license_link)
    return (origin.license,)


def _terms(origin: Origin) -> str:
    return ", ".join(code(part) for part in _stated(origin) if part) or code("nothing")


LICENSES = frozenset(
    [
        "afl-3.0",
        "agpl-3.0",
        "apache-2.0",
        "apple-amlr",
        "apple-ascl",
        "artistic-2.0",
        "bigcode-openrail-m",
        "bigscience-bloom-rail-1.0",
        "bigscience-openrail-m",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "bsd-3-clause-clear",
        "bsl-1.0",
        "c-uda",
        "cc",
        "cc-by-2.0",
        "cc-by-2.5",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc-by-nc-2.0",
        "cc-by-nc-3.0",
        "cc-by-nc-4.0",
        "cc-by-nc-nd-3.0",
        "cc-by-nc-nd-4.0",
        "cc-by-nc-sa-2.0",
        "cc-by-nc-sa-3.0",
        "cc-by-nc-sa-4.0",
        "cc-by-nd-4.0",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "cc0-1.0",
        "cdla-permissive-1.0",
        "cdla-permissive-2.0",
        "cdla-sharing-1.0",
        "creativeml-openrail-m",
        "deepfloyd-if-license",
        "ecl-2.0",
        "epl-1.0",
        "epl-2.0",
        "etalab-2.0",
        "eupl-1.1",
        "eupl-1.2",
        "fair-noncommercial-research-license",
        "gemma",
        "gfdl",
        "gpl",
        "gpl-2.0",
        "gpl-3.0",
        "grok2-community",
        "h-research",
        "intel-research",
        "isc",
        "lgpl",
        "lgpl-2.1",
        "lgpl-3.0",
        "lgpl-lr",
        "llama2",
        "llama3",
        "llama3.1",
        "llama3.2",
        "llama3.3",
        "llama4",
        "lppl-1.3c",
        "mit",
        "mpl-2.0",
        "ms-pl",
        "ncsa",
        "odbl",
        "odc-by",
        "ofl-1.1",
        "openmdw-1.0",
        "openmdw-1.1",
        "openrail",
        "openrail++",
        "osl-3.0",
        "other",
        "pddl",
        "postgresql",
        "unknown",
        "unlicense",
        "wtfpl",
        "zlib",
    ]
)
# A card that says this says nothing.
NO_LICENSE = "unknown"
