"""Write model cards: render the template, escape foreign text, leave edited cards alone."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from cbd_trl.utils.files import write_text
from cbd_trl.utils.formatting import markdown_table

README = "README.md"
# The chart beside a card, where losses were measured.
PICTURE = "loss-against-size.png"
# Files beside a model that are no part of it: when they change, the model stays what it was.
CARD_FILES = (README, PICTURE)

_TEMPLATE = "model_card.md.jinja"
_SEAL = "<!-- Written by cbd_trl ({digest}): rewritten with what it describes; once edited, left as it is. -->\n"
_SEALED = re.compile(r"<!-- Written by cbd_trl \((\w+)\): [^\n]* -->\n?$")
_PICTURE_SECTION = f"## Loss against size\n\n![Held-out loss against the number of parameters]({PICTURE})"
_GENERATE = """from transformers import pipeline
generator = pipeline("text-generation", model="{name}")
print(generator("Once upon a time")[0]["generated_text"])"""
# GitHub turns this into a link by itself; every other trigger contains a colon or an @.
_WEB = re.compile(r"www\.", re.IGNORECASE)
# Logged losses and their titles on a card; a unit only where it is the same for every divergence and weight.
_LOSSES = {
    "loss": "loss",
    "kd": "divergence from the teacher",
    "ce": "cross-entropy (nats)",
    "hidden": "distance of the layers (no unit)",
    "teacher_ce": "cross-entropy of the teacher (nats)",
    "unaligned": "share that the teacher has no tokens for",
}


def render_card(
    data: ModelCardData,
    *,
    title: str,
    summary: str,
    facts: Mapping[str, str],
    use: str,
    license: str,
    sections: Sequence[str] = (),
    picture: bool = False,
) -> str:
    """Render a card, with a seal that shows whether anybody edited it afterwards.

    Args:
        data: the metadata, from `card_metadata`.
        title: of the card.
        summary: what the model is, in Markdown.
        facts: rows of the table below the summary.
        use: lines of Python that load the model.
        license: the sentence from `license_sentence`.
        sections: Markdown, each with its own heading.
        picture: whether `PICTURE` lies beside the card.

    Returns:
        the text of README.md. Text that others wrote must have passed `plain` or `code` before.
    """
    with as_file(files("cbd_trl.cards").joinpath(_TEMPLATE)) as template:
        card = ModelCard.from_template(
            data,
            template_path=str(template),
            title=title,
            summary=summary,
            facts=markdown_table(["", ""], facts.items()),
            sections=[section.strip() for section in (*sections, *([_PICTURE_SECTION] if picture else []))],
            use=use,
            license=license,
        )
    text = f"{card}\n"
    return f"{text}\n{_SEAL.format(digest=_digest(text))}"


def current_card(folder: Path, rendered: str) -> str:
    """Return the card that a folder should have: its own if somebody wrote or edited it, otherwise the rendered one.

    Args:
        folder: may hold a README.md.
        rendered: from `render_card`.
    """
    existing = _read(folder / README)
    return rendered if existing is None or _is_untouched(existing) else existing


def save_card(folder: Path, rendered: str) -> None:
    """Write a card into a folder, unless an edited one is there or nothing has changed.

    Args:
        folder: gets README.md.
        rendered: from `render_card`.

    Raises:
        OSError: it cannot be written.
    """
    if _read(folder / README) != current_card(folder, rendered):
        write_text(folder / README, rendered)


def plain(text: object) -> str:
    """Escape foreign text (a name, a value of a manifest) to one line in which nothing is a link, HTML or code."""
    return _WEB.sub("www?", re.sub(r"[^\w .,;/+()=%-]", "?", " ".join(str(text).split())))


def code(text: object) -> str:
    """Escape foreign text as code between backticks: only backticks and bars are replaced."""
    # Empty code would be two backticks, which open code that goes on to the next two.
    return f"`{re.sub(r'[`|]', '?', ' '.join(str(text).split())) or '?'}`"


def usage_lines(name: str) -> str:
    """Return three lines of Python that generate text with a model.

    Args:
        name: of its folder or its repository.
    """
    return _GENERATE.format(name=plain(name))


def losses_table(columns: Mapping[str, tuple[str, Mapping[str, float]]]) -> str:
    """Tabulate logged losses, per token.

    Args:
        columns: prefix of the losses' names (empty, or such as "eval_") -> title of the column, and the losses.

    Returns:
        Markdown; empty without columns.
    """
    if not columns:
        return ""
    rows = []
    for name, text in _LOSSES.items():
        values = [losses.get(f"{prefix}{name}") for prefix, (_, losses) in columns.items()]
        if any(value is not None for value in values):
            rows.append([text, *("" if value is None else f"{value:.4g}" for value in values)])
    return markdown_table(["per token", *(title for title, _ in columns.values())], rows)


def evaluation_prefix(key: str) -> str | None:
    """Return the prefix of a loss's name: "" in training, "eval_" or "eval_<set>_" in evaluation, None otherwise."""
    prefix = key.removesuffix("loss")
    return prefix if prefix != key and (prefix == "" or prefix.startswith("eval_")) else None


def _is_untouched(text: str) -> bool:
    seal = _SEALED.search(text)
    return seal is not None and seal[1] == _digest(text[: seal.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


def _read(file: Path) -> str | None:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None
