"""Families whose width is heads x head size, so that width and heads are one choice."""

from collections.abc import Mapping
from dataclasses import dataclass

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class WidthOfHeads:
    """The arithmetic of such a family, and its errors in the family's own words.

    Args:
        family: its name for a reader.
        width, heads: its config fields.
    """

    family: str
    width: str
    heads: str

    def head_size(self, width: int, heads: int) -> int:
        """Width / heads.

        Raises:
            ValueError: the division leaves a rest.
        """
        if width % heads:
            raise ValueError(
                f"{self.width}={width} is not a multiple of {self.heads}={heads}: {self.family} splits its width "
                "evenly into heads. Choose a multiple."
            )
        return width // heads

    def check(self, sizes: Sizes) -> None:
        """Refuse sizes whose heads do not fill the width (ValueError)."""
        heads, dim = sizes["group"] * sizes["query"], sizes["dim"]
        if sizes["width"] != heads * dim:
            raise ValueError(
                f"{self.family} ties its width to its heads: {self.width}={sizes['width']} needs {self.width} / {dim} "
                f"heads of size {dim}, got {self.heads}={heads}. Choose {self.width} = {dim} x {self.heads}."
            )

    def with_heads(self, sizes: Sizes, given: Sizes) -> dict[str, int]:
        """What was asked for, and the number of heads that a width means."""
        if "width" not in given or "heads" in given or "group" in given:
            return dict(given)
        return {**given, "heads": max(given["width"] // sizes["dim"], 1)}

    def with_width(self, sizes: Sizes, given: Sizes) -> dict[str, int]:
        """Sizes with resolved heads, and the width that they fill.

        Raises:
            ValueError: another width was asked for.
        """
        heads, dim = sizes["group"] * sizes["query"], sizes["dim"]
        width = given.get("width", heads * dim)
        if width != heads * dim:
            raise ValueError(
                f"{self.family} ties its width to its heads (head size {dim}): got {self.width}={width} with "
                f"{self.heads}={heads}. Choose {self.width} = {dim} x {self.heads}."
            )
        return {**sizes, "width": width}

    def resolve(self, sizes: Sizes, given: Sizes) -> dict[str, int]:
        """`Family.resolve` of a family whose every head has its own key and value."""
        given = self.with_heads(sizes, given)
        resolved = {**sizes, "group": given.get("heads", sizes["group"]), "ffn": given.get("ffn", sizes["ffn"])}
        return self.with_width(resolved, given)
