"""The one template of all cards, and how foreign words are put into it."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCardData

from cbd_trl.utils.files import write_text

# Beside a card, under this name, where losses were measured.
PICTURE = "loss-against-size.png"
_TEXT = """---
{data}
---

# {title}

{summary}

{facts}
{sections}
## How to use it

```python
{use}
```

## Licence

{license}
"""
_SEAL = "<!-- Written by cbd_trl ({digest}): rewritten with what it describes; once edited, left as it is. -->\n"
# What GitHub makes a link of without being asked, besides what has a colon or an @ in it.
_WEB = re.compile(r"www\.", re.IGNORECASE)
_GENERATE = """from transformers import pipeline
generator = pipeline("text-generation", model="{name}")
print(generator("Once upon a time")[0]["generated_text"])"""
_SEALED = re.compile(r"<!-- Written by cbd_trl \((\w+)\): [^\n]* -->\n?$")


@dataclass(frozen=True)
class Card:
    """What a card says.

    Args:
        title: of the card.
        summary: what the model is.
        facts: rows of the table under it.
        use: lines of Python.
        license: which one holds, or why none is stated.
        sections: Markdown with headings of its own.
        picture: whether `PICTURE` lies beside it.
    """

    title: str
    summary: str
    facts: Mapping[str, str]
    use: str
    license: str
    sections: Sequence[str] = field(default_factory=tuple)
    picture: bool = False

    def text(self, data: ModelCardData) -> str:
        """The whole card, with a seal by which an edited one is told from one that nobody touched.

        Args:
            data: its metadata.
        """
        picture = [f"## Loss against size\n\n![Held-out loss against the number of parameters]({PICTURE})"]
        sections = [*self.sections, *(picture if self.picture else [])]
        text = _TEXT.format(
            data=data.to_yaml().strip(),
            title=self.title,
            summary=self.summary,
            facts=table(["", ""], self.facts.items()),
            sections="".join(f"\n{section.strip()}\n" for section in sections),
            use=self.use,
            license=self.license,
        )
        return text + "\n" + _SEAL.format(digest=_digest(text))


def is_untouched(text: str) -> bool:
    """Whether a card is as `Card.text` made it."""
    seal = _SEALED.search(text)
    return seal is not None and seal[1] == _digest(text[: seal.start()])


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown.

    Args:
        header: titles of the columns.
        rows: their cells.
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(text: object) -> str:
    """Words from elsewhere (a name, a value of a manifest) as one line in which nothing is a link, HTML or code."""
    return _WEB.sub("www?", re.sub(r"[^\w .,;/+()=%-]", "?", " ".join(str(text).split())))


def code(text: object) -> str:
    """The same between backticks, for values: all but what would end them, or the cell of a table, stays as it is."""
    # Two backticks with nothing between them would begin code that goes on to the next two.
    return f"`{re.sub(r'[`|]', '?', ' '.join(str(text).split())) or '?'}`"


def generate_with(name: str) -> str:
    """Three lines of Python that let a model write.

    Args:
        name: of its folder or its repository.
    """
    return _GENERATE.format(name=plain(name))


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


README = "README.md"
# Beside a model, and none of it: what these say may change and the model stays what it was.
CARD_FILES = (README, PICTURE)


def current_card(folder: Path, made: str) -> str:
    """The card of a folder.

    Args:
        folder: whose README.md is kept if somebody wrote or edited it.
        made: the card otherwise.
    """
    there = _read(folder / README)
    return made if there is None or is_untouched(there) else there


def save_card(folder: Path, made: str) -> None:
    """Write a card into a folder, unless one that somebody edited is there or nothing has changed.

    Args:
        folder: gets README.md.
        made: the card.

    Raises:
        OSError: it cannot be written.
    """
    if _read(folder / README) != current_card(folder, made):
        write_text(folder / README, made)


def _read(file: Path) -> str | None:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None


# Logged terms, by what they are called on a card. A unit only where it is the same for every divergence and weight.
_TERMS = {
    "loss": "loss",
    "kd": "divergence from the teacher",
    "ce": "cross-entropy (nats)",
    "hidden": "distance of the layers (no unit)",
    "teacher_ce": "cross-entropy of the teacher (nats)",
    "unaligned": "share that the teacher has no tokens for",
}


def losses_table(columns: Mapping[str, tuple[str, Mapping[str, float]]]) -> str:
    """A table of logged terms, per token.

    Args:
        columns: prefix of the terms' names (empty, or such as "eval_") -> title of the column, and where they are.

    Returns:
        Markdown; empty where there are no columns.
    """
    if not columns:
        return ""
    rows = []
    for name, text in _TERMS.items():
        values = [entry.get(f"{prefix}{name}") for prefix, (_, entry) in columns.items()]
        if any(value is not None for value in values):
            rows.append([text, *("" if value is None else f"{value:.4g}" for value in values)])
    return table(["per token", *(title for title, _ in columns.values())], rows)


def evaluation_prefix(key: str) -> str | None:
    """Of the name of a loss: empty in training, "eval_" or "eval_<set>_" in an evaluation; None of anything else."""
    prefix = key.removesuffix("loss")
    return prefix if prefix != key and (prefix == "" or prefix.startswith("eval_")) else None


def recorded_losses(losses: Mapping[str, float]) -> str:
    """The losses that chain.json has of an anchor.

    Args:
        losses: as an `Anchor` has them.
    """
    prefixes = [prefix for key in losses if (prefix := evaluation_prefix(key)) is not None]
    return losses_table({prefix: (plain(prefix.strip("_") or "training"), losses) for prefix in prefixes})
