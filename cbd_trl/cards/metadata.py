"""Make the metadata in front of a card: only what is known, and only values in the form that the Hub takes."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from huggingface_hub import ModelCardData

from cbd_trl.cards.card import code
from cbd_trl.cards.origin import Origin, hub_ids

# How a model comes from its base models (https://huggingface.co/docs/hub/model-cards#specifying-a-base-model).
Relation = Literal["finetune", "merge", "adapter"]

# The form of a license identifier of the Hub, such as bsd-3-clause or openrail++. Which ones exist is for the Hub to
# say: its client has every card validated before it commits.
_LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
# The identifier of a card whose author does not know either.
_UNKNOWN = "unknown"


def card_metadata(
    origins: Sequence[Origin],
    *,
    relation: Relation = "finetune",
    library: str = "transformers",
    name: str,
    datasets: Iterable[str] = (),
    tags: Iterable[str] = (),
    before: Iterable[str] = (),
) -> ModelCardData:
    """Make the metadata of a card.

    Args:
        origins: the models it comes from; those on the Hub are its base models, a license that all of them share is
            its own, and where they have several it is "other", by the names of all.
        relation: how it comes from them; left out where none is on the Hub, "finetune" where only one would be merged.
        library: that loads it.
        name: of the model.
        datasets: names of what it was trained on; names that are not Hub ids are left out.
        tags: besides "cbd_trl" and "distillation".
        before: base models that come before those of the origins.

    Raises:
        ValueError: a tag is not text.
    """
    tags = list(dict.fromkeys(["cbd_trl", "distillation", *tags]))
    for tag in tags:
        if not isinstance(tag, str) or not tag:
            raise ValueError(f"tags of a card must be a list of names, got {tag!r} among {tags}. Leave it out.")
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
        "tags": tags,
    }
    return ModelCardData(**known)


def license_sentence(origins: Sequence[Origin]) -> str:
    """Say in a sentence which license holds, or why none is stated."""
    sources = ", ".join(dict.fromkeys(code(origin.label) for origin in origins))
    if not origins:
        return (
            "None is stated: the source of this model is not known. Look its license up before you share this model."
        )
    one, fields = len({_terms(origin) for origin in origins}) == 1, _license_fields(origins)
    if one and fields:
        extra = "".join(f", {code(fields[key])}" for key in ("license_name", "license_link") if key in fields)
        return f"{code(fields['license'])}{extra}: carried over from {sources}."
    if all(origin.license in (None, _UNKNOWN) for origin in origins):
        return (
            f"None is stated, because none was found with the source, {sources}. Look it up there before you share "
            "this model."
        )
    found = ", ".join(dict.fromkeys(f"{_describe_terms(origin)} ({code(origin.label)})" for origin in origins))
    reason = "that is not one identifier of the Hub" if one else "they are not the same"
    above = f"{code(fields['license'])} is stated" if fields else "None is stated"
    what = "it" if one else "all of them"
    return f"The sources state: {found}. {above} above, because {reason}. Look {what} up before you share this model."


def _license_fields(origins: Sequence[Origin]) -> dict[str, str]:
    """Return the license of all origins, "other" where they state several; empty where one of them states none, or
    one without an identifier."""
    terms = {_terms(origin) for origin in origins}
    if len(terms) > 1:
        stated = [origin.license_name if origin.license == "other" else origin.license for origin in origins]
        names = dict.fromkeys(name for name in stated if name and name != _UNKNOWN and _LICENSE_ID.fullmatch(name))
        return {"license": "other", "license_name": "-and-".join(names)} if len(names) == len(terms) else {}
    if not terms:
        return {}
    license = origins[0].license
    if license is None or license == _UNKNOWN or not _LICENSE_ID.fullmatch(license):
        return {}
    if license == "other" and not origins[0].license_name:
        return {}
    known = {"license": license}
    for key in ("license_name", "license_link"):
        # Several models of one license each link to a copy of their own.
        values = {getattr(origin, key) for origin in origins}
        if len(values) == 1 and (value := values.pop()) is not None:
            known[key] = value
    return known


def _terms(origin: Origin) -> tuple[str | None, ...]:
    """What must be equal for two licenses to be one: of a license called "other" its name and its link too."""
    if origin.license == "other":
        return (origin.license, origin.license_name, origin.license_link)
    return (origin.license,)


def _describe_terms(origin: Origin) -> str:
    return ", ".join(code(part) for part in _terms(origin) if part) or code("nothing")
