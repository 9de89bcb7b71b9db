"""A chain on the Hub: chain.json first, then, at that same commit, the files that are really used."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from cbd_trl.chain.chain_json import read_manifest
from cbd_trl.chain.folders import verify_config, verify_files
from cbd_trl.chain.records import MANIFEST, Anchor, Manifest


class HubChain:
    """The files of a chain in a Hub repository at one commit, fetched into the Hub's cache when they are first needed
    and checked then.

    Args:
        repo_id: the repository.
        revision: branch, tag or commit; None for the main branch. It is resolved once, to the commit of chain.json.
        token: Hub token.
        verify: compare the sha256 of what is used with chain.json.

    Raises:
        ValueError: there is no such chain, or it is not in the cache and the Hub cannot be reached.
    """

    def __init__(
        self, repo_id: str, revision: str | None = None, token: str | bool | None = None, verify: bool = True
    ) -> None:
        from huggingface_hub import hf_hub_download

        self._repo_id, self._token, self._verify = repo_id, token, verify
        try:
            manifest = Path(hf_hub_download(repo_id, MANIFEST, revision=revision, token=token))
        except (OSError, ValueError) as error:
            at = "" if revision is None else f" (revision {revision!r})"
            raise ValueError(
                f"{repo_id!r}{at} is no folder here, and its {MANIFEST} could not be fetched from the Hub "
                f"({type(error).__name__}: {error}). Check the path, or the id, revision and token; offline, only "
                "what was fetched before can be opened."
            ) from error
        # The cache keeps every commit in a folder named after it.
        self.folder = manifest.parent
        self.commit = self.folder.name
        self._model_type = ""
        self._ready: set[str] = set()

    def manifest(self) -> Manifest:
        """What chain.json says, with anchors that fetch their files.

        Raises:
            ValueError: it is damaged, edited or of another schema version.
        """
        manifest = read_manifest(self.folder)
        self._model_type = manifest.model_type
        anchors = tuple(dataclasses.replace(anchor, prepare=self._prepare) for anchor in manifest.anchors)
        return dataclasses.replace(manifest, anchors=anchors)

    def _prepare(self, anchor: Anchor, names: Sequence[str]) -> None:
        new = [name for name in names if f"{anchor.name}/{name}" not in self._ready]
        if not new:
            return
        self._fetch([f"{anchor.name}/{name}" for name in new])
        verify_files(self.folder, anchor, new, hashes=self._verify)
        # Before the config is read, which asks for its file again.
        self._ready |= {f"{anchor.name}/{name}" for name in new}
        anchor.check_no_code()
        if "config.json" in new:
            verify_config(self.folder, anchor, self._model_type)

    def _fetch(self, files: Sequence[str]) -> None:
        from huggingface_hub import snapshot_download

        missing = [file for file in files if not (self.folder / file).exists()]
        if not missing:
            return
        try:
            # Names of files in a chain hold no wildcards, so each pattern is one file.
            snapshot_download(self._repo_id, revision=self.commit, token=self._token, allow_patterns=missing)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self._repo_id!r} at commit {self.commit}: {', '.join(missing)} could not be fetched from the Hub "
                f"and {'is' if len(missing) == 1 else 'are'} not in its cache here ({type(error).__name__}: {error}). "
                "Ask for it once with a connection (and without HF_HUB_OFFLINE); after that it works offline."
            ) from error
