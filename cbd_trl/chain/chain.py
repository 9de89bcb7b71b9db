"""A chain on disk: opened and checked, copied, written anchor by anchor.

DIR/chain.json                  what the chain is made of (see manifest.py)
DIR/<anchor>/                   a model folder as save_pretrained writes it, with tokenizer and statistics.safetensors
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers import PreTrainedTokenizerBase

from cbd_trl.cards.card import CARD_FILES
from cbd_trl.chain.anchor import Anchor
from cbd_trl.chain.cards import save_cards
from cbd_trl.chain.folders import (
    check_block_map,
    check_one_tokenizer,
    copy_anchor,
    verify_anchor,
    verify_hashes,
    write_anchor,
)
from cbd_trl.chain.hub import open_on_hub, place_anchors
from cbd_trl.chain.manifest import MANIFEST, STATISTICS_FILE, AnchorRecord, Manifest, read_manifest, write_manifest
from cbd_trl.chain.measurements import MEASURED
from cbd_trl.chain.push import Push
from cbd_trl.shapes.budget import Budget, ParameterCount
from cbd_trl.shapes.solve import list_sizes

__all__ = ["STATISTICS_FILE", "Anchor", "Chain", "write_anchor"]


class Chain:
    """Anchors on disk, largest first, each distilled from the one above.

    Args:
        path: the chain's folder.
        manifest: its chain.json.
        anchors: the anchors of the manifest, with their folders.
        name_or_path: what it was opened with, a Hub id or a path.
        revision: the commit of a chain on the Hub; None for a folder.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        anchors: Sequence[Anchor],
        name_or_path: str | None = None,
        revision: str | None = None,
    ) -> None:
        self.path = path
        self.name_or_path = name_or_path if name_or_path is not None else str(path)
        self.revision = revision
        self.checksum = manifest.checksum
        self.model_type = manifest.model_type
        self.versions = dict(manifest.versions)
        self.anchors = list(anchors)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{anchor.name} {anchor.num_parameters:,}" for anchor in self.anchors)
        return f"Chain({str(self.path)!r}, {self.model_type}: {sizes})"

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        revision: str | None = None,
        token: str | bool | None = None,
        verify: bool = True,
    ) -> "Chain":
        """Open a chain.

        Of a chain on the Hub chain.json alone is fetched; the files of an anchor come when they are first used, all
        from that same commit.

        Args:
            path_or_hub_id: a folder that build_chain wrote, or the id of a Hub repository that holds one.
            revision: branch, tag or commit of the Hub repository.
            token: Hub token.
            verify: compare every file with the sha256 in chain.json (a second per one or two GB; remembered for files
                that stay as they are); on the Hub when it is first used.

        Raises:
            ValueError: not a chain, damaged, edited, unfinished, of several tokenizers, or of an unknown schema
                version; the message names the file.
        """
        local, name = _local_folder(path_or_hub_id), str(path_or_hub_id)
        hub = None if local else open_on_hub(name, revision, token)
        folder = hub.path if hub else Path(name).expanduser()
        manifest = read_manifest(folder)
        anchors = place_anchors(manifest, folder, hub, token, verify)
        chain = cls(folder, manifest, anchors, name, hub.commit if hub else None)
        above: Anchor | None = None
        for anchor in chain.anchors:
            if not anchor.finished:
                raise ValueError(
                    f"{chain.path / MANIFEST}: anchor {anchor.name!r} is not finished. Run build_chain again with the "
                    "same arguments."
                )
            if anchor.fetch is None:
                verify_anchor(folder, anchor, chain.model_type, hashes=verify)
                if above is not None and above.fetch is None:
                    check_block_map(folder, anchor, above)
            above = anchor
        check_one_tokenizer(chain.anchors, chain.path / MANIFEST)
        return chain

    def verify(self, files: Mapping[str, Sequence[str]]) -> None:
        """Compare some files, which are here, with the sha256 in chain.json.

        Args:
            files: anchor -> names of its files.

        Raises:
            ValueError: one is damaged or was changed; the message names it.
        """
        anchors = {name: self[name] for name in files}
        verify_hashes(
            self.path,
            {anchors[name].path / file: anchors[name].files[file] for name, some in files.items() for file in some},
        )

    @property
    def source(self) -> Anchor:
        """The first anchor, which all others come from."""
        return self.anchors[0]

    def __getitem__(self, name: str) -> Anchor:
        """An anchor by name.

        Raises:
            ValueError: there is none of that name.
        """
        for anchor in self.anchors:
            if anchor.name == name:
                return anchor
        raise ValueError(
            f"The chain in {self.path} has no anchor {name!r}. Anchors: {', '.join(a.name for a in self.anchors)}."
        )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer that all anchors share.

        Raises:
            ValueError: none was stored.
        """
        return self.source.load_tokenizer()

    def pair_for(
        self,
        num_parameters: float | None = None,
        config: Mapping[str, Any] | None = None,
        tolerance: float = 0.03,
        budget: type[Budget] = ParameterCount,
    ) -> tuple[Anchor, Anchor]:
        """Find the two neighboring anchors that a target lies between.

        Args:
            num_parameters: its size; of what, the budget says.
            config: config fields it has.
            tolerance: how far outside the chain, as a share, a size may lie and still count as the chain's end.
            budget: what the size counts.

        Raises:
            ValueError: fewer than two anchors, or no pair around it; the message has the sizes there are.
        """
        pairs = list(zip(self.anchors, self.anchors[1:], strict=False))
        if not pairs:
            raise ValueError(
                f"The chain in {self.path} has one anchor, nothing lies between. Add a smaller one with build_chain."
            )
        sizes = [anchor.size(budget) for anchor in self.anchors]
        by_size = [
            pair
            for pair, high, low in zip(pairs, sizes, sizes[1:], strict=False)
            if num_parameters is None or low <= num_parameters <= high
        ]
        if num_parameters is not None and not by_size:
            # A size just past an end means that end.
            ends = (pairs[0], sizes[0]), (pairs[-1], sizes[-1])
            by_size = [pair for pair, end in ends if abs(num_parameters - end) <= tolerance * end]
            if not by_size:
                raise ValueError(
                    f"{budget.name}={num_parameters:,.0f} lies outside the chain in {self.path}, whose models have "
                    f"{sizes[-1]:,} to {sizes[0]:,} {budget.unit}. Request a size "
                    "between the two, or build a chain that reaches it."
                )
        for pair in by_size:
            if all(
                pair[1].shape.get(name, 0) <= value <= pair[0].shape.get(name, value)
                for name, value in (config or {}).items()
            ):
                return pair
        offers = "; ".join(
            f"{upper.name} to {lower.name}: {lower.num_parameters:,} to {upper.num_parameters:,} parameters, "
            + ", ".join(f"{name} {lower.shape[name]} to {value}" for name, value in upper.shape.items())
            for upper, lower in pairs
        )
        size = [f"{budget.name}={num_parameters:,.0f}"] if num_parameters is not None else []
        requested = ", ".join(size + [f"{name}={value}" for name, value in (config or {}).items()])
        raise ValueError(
            f"No two neighboring anchors of the chain in {self.path} lie around {requested}. What lies between them: "
            f"{offers}."
        )

    def sizes(self) -> list[dict[str, Any]]:
        """List what can be made between neighboring anchors.

        Returns:
            One entry a pair: `upper`, `lower` (names), `num_parameters` [smallest, largest] and `shape`
            {config field: values on offer}.
        """
        entries = []
        for upper, lower in zip(self.anchors, self.anchors[1:], strict=False):
            between = list_sizes(upper.architecture(), lower.architecture(), lower.block_map or [], lower.kept_layers)
            entries.append({"upper": upper.name, "lower": lower.name, **between})
        return entries

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Copy the chain, anchors of other repositories into its folder too; chain.json is written last, so that a
        copy cut short is not taken for a chain.

        Raises:
            ValueError: the folder holds something other than a chain.
        """
        target = Path(save_directory).expanduser()
        if target.resolve() == self.path.resolve():
            return
        if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / MANIFEST).exists())):
            raise ValueError(
                f"{target} exists and is not a chain; nothing there is overwritten. Choose a new or an empty folder."
            )
        target.mkdir(parents=True, exist_ok=True)
        (target / MANIFEST).unlink(missing_ok=True)
        for anchor in self.anchors:
            copy_anchor(anchor, target)
        for name in (*CARD_FILES, MEASURED):
            # What is there may be of another chain.
            (target / name).unlink(missing_ok=True)
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, target / name)
        here: list[AnchorRecord] = [anchor.model_copy(update={"repo": None}) for anchor in self.anchors]
        write_manifest(target, Manifest(model_type=self.model_type, versions=self.versions, anchors=here))
        save_cards(Chain.from_pretrained(target, verify=False))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload chain",
        own_repos: bool = False,
    ) -> CommitInfo:
        """Upload the chain and its cards to a Hub repository, made if there is none; a chain in it is replaced.

        All is committed at once, chain.json with the rest: an interrupted upload leaves no chain.json, and the same
        call again sends only what is missing.

        Args:
            repo_id: the repository, "me/my-chain".
            private: whether a repository that is made is private; None for the owner's default. With True, one that is
                there and public is refused.
            token: Hub token; None for the one that was logged in with.
            revision: branch, made if there is none; None for the main branch.
            commit_message: of the commit.
            own_repos: put each anchor in a repository of its own, "me/my-chain-<anchor>", where it is a model like any
                other, and pin its commit in chain.json. One that holds another model is refused.

        Returns:
            The commit: its address, with the hash in `oid`.

        Raises:
            ValueError: a bad id, a token that may not write there, or a repository that holds something else.
            ConnectionError: the upload was cut off.
        """
        return Push(private, token, revision, commit_message, own_repos).send(self, repo_id)


def _local_folder(path_or_hub_id: str | Path) -> Path | None:
    """The chain's folder; None where a Hub id is given."""
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(path_or_hub_id, Path) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path_or_hub_id):
        raise ValueError(
            f"There is no folder {folder}. Give the folder that build_chain wrote, or a Hub id such as 'me/my-chain'."
        )
    return None
