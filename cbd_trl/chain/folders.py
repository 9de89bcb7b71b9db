"""An anchor's folder: checked against its record, written, copied; always under a temporary name first."""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

from cbd_trl.architectures import describe
from cbd_trl.cards.card import CARD_FILES
from cbd_trl.chain.anchor import Anchor
from cbd_trl.chain.manifest import (
    DTYPES,
    MANIFEST,
    RESTORE,
    STATISTICS_FILE,
    AnchorRecord,
    Manifest,
    check_order,
    library_versions,
    read_manifest,
    weight_files,
    write_manifest,
)
from cbd_trl.surgery.blocks import Block, check_blocks
from cbd_trl.utils.files import TEMPORARY, flush, sha256_of
from cbd_trl.utils.model_folders import drop_code, load_config
from cbd_trl.utils.progress import Progress
from cbd_trl.utils.tensor_files import read_header
from cbd_trl.utils.tokenizers import stored_tokenizer_hash, tokenizer_difference
from cbd_trl.utils.untrusted import check_inside, validated

ONE_TOKENIZER = (
    "The anchors of a chain share one tokenizer: a target's vocabulary rows are interpolated token by token, so a row "
    "must stand for the same token in all of them. To come from another tokenizer, begin the chain with "
    "build_chain(..., bridge=BridgeStep(...)), or first give the model this tokenizer with "
    "cbd_trl.bridge.transplant_vocabulary."
)


def check_one_tokenizer(anchors: Sequence[Anchor], file: Path) -> None:
    """Check that anchors have one tokenizer, by its hash; those without one are passed over.

    Args:
        anchors: of one chain.
        file: chain.json, for the message.

    Raises:
        ValueError: naming two anchors, and what differs.
    """
    having = [anchor for anchor in anchors if anchor.tokenizer_sha256 is not None]
    for above, anchor in pairwise(having):
        if anchor.tokenizer_sha256 != above.tokenizer_sha256:
            raise ValueError(
                f"{file}: the anchors {above.name!r} and {anchor.name!r} have different tokenizers: "
                f"{_difference(above, anchor)}. {ONE_TOKENIZER}"
            )


def _difference(above: Anchor, anchor: Anchor) -> str:
    one, other = above.load_tokenizer(), anchor.load_tokenizer()
    names = f"{above.name}'s", f"{anchor.name}'s"
    return (
        tokenizer_difference(one, other, names=names, further_tokens="neither")
        or "they have one vocabulary, but other rules for text or another begin or unknown token"
    )


# What transformers reads from a model's folder on its own.
_READ_BY_DEFAULT = (".json", ".jinja", ".model", ".txt")


def verify_anchor(folder: Path, anchor: Anchor, model_type: str, hashes: bool = True) -> None:
    """Compare an anchor's folder with its record.

    Args:
        folder: the chain's folder.
        hashes: whether to compare the files' sha256 too.

    Raises:
        ValueError: a file is missing, differs, names code, or leads out of the chain; one that is not recorded would
            be read; the config does not have the recorded shape; with `hashes`, tensors or tokenizer are not those
            recorded either.
    """
    verify_files(folder, anchor, list(anchor.files), hashes)
    _check_unlisted(folder, anchor)
    verify_config(folder, anchor, model_type)
    anchor.check_no_code()
    if hashes:
        anchor.load_state_dict()
        anchor.check_tokenizer()


def verify_files(folder: Path, anchor: Anchor, names: Sequence[str], hashes: bool = True) -> None:
    """Compare some of an anchor's files with its record (see `verify_anchor`)."""
    for name in names:
        file = anchor.path / name
        check_inside(folder if anchor.repo is None else anchor.path, file, RESTORE)
        if not file.is_file():
            raise ValueError(f"{file} is missing, but {folder / MANIFEST} lists it. {RESTORE}")
    if hashes:
        verify_hashes(folder, {anchor.path / name: anchor.files[name] for name in names})


def _check_unlisted(folder: Path, anchor: Anchor) -> None:
    """Check for files that nobody recorded and transformers would read: a chat template, an adapter, a vocabulary."""
    found = {path.relative_to(anchor.path).as_posix() for path in anchor.path.glob("**/*") if path.name[0] != "."}
    for name in sorted(found - anchor.files.keys()):
        if name.endswith(_READ_BY_DEFAULT):
            raise ValueError(
                f"{anchor.path / name} would be read with the anchor, but {folder / MANIFEST} does not list it: "
                f"somebody put it there. Take it out. {RESTORE}"
            )


def verify_hashes(folder: Path, recorded: Mapping[Path, str]) -> None:
    """Compare the sha256 of files with what is recorded of them, several files at a time.

    Args:
        folder: the chain's folder.
        recorded: file -> sha256.

    Raises:
        ValueError: a file differs.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        hashes = Progress("Checking files", pool.map(sha256_of, recorded), total=len(recorded), unit="files")
        for (file, digest), found in zip(recorded.items(), hashes, strict=True):
            if found != digest:
                raise ValueError(
                    f"{file} is damaged or was changed: its sha256 is not the one in {folder / MANIFEST}. {RESTORE}"
                )


def verify_config(folder: Path, anchor: Anchor, model_type: str) -> None:
    """Compare an anchor's config with its record (see `verify_anchor`)."""
    config = anchor.config()
    if config.model_type != model_type:
        raise ValueError(
            f"{anchor.path / 'config.json'} is of model type {config.model_type!r}, {folder / MANIFEST} says "
            f"{model_type!r}. {RESTORE}"
        )
    architecture = anchor.architecture()
    found, recorded = (architecture.shape, architecture.num_parameters), (anchor.shape, anchor.num_parameters)
    if found != recorded:
        raise ValueError(
            f"{anchor.path / 'config.json'} has the shape {found[0]} ({found[1]:,} parameters), but "
            f"{folder / MANIFEST} records {recorded[0]} ({recorded[1]:,}). {RESTORE}"
        )


def check_block_map(folder: Path, anchor: Anchor, above: Anchor) -> None:
    """Check that a block map splits the layers of the anchor above (ValueError naming chain.json)."""
    try:
        check_blocks(anchor.block_map or [], anchor.architecture().depth, above.architecture().depth)
    except ValueError as error:
        raise ValueError(f"{folder / MANIFEST}: anchor {anchor.name!r}: {error} {RESTORE}") from error


def check_place(folder: Path, names: Iterable[str]) -> None:
    """Check that anchors would not be written over something else.

    A folder without the statistics of an anchor is not one that a killed run left here.

    Args:
        folder: the chain's folder, which need not be there.
        names: of the anchors to write.

    Raises:
        ValueError: the folder is a file, or holds something of that name.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, and a chain is a folder. Choose another output_dir.")
    for name in names:
        place = folder / name
        if place.exists() and not (place / STATISTICS_FILE).is_file():
            raise ValueError(
                f"{place} is there already, and no anchor of a chain (it has no {STATISTICS_FILE}): the anchor {name} "
                "would take its place. Choose another output_dir, or move it away."
            )


def write_anchor(folder: str | Path, record: Mapping[str, Any], fill: Callable[[Path], None]) -> Anchor:
    """Write one anchor and record it in chain.json, which never lists a part of a model, whatever happens in between.

    Args:
        folder: the chain's folder, made if there is none.
        record: `name`, `parent`, `blocks` and what is known of its training (fields of `AnchorRecord`). A block is a
            `Block`, or a list of layers, of which the last is the kept one. Shape, dtype, tokenizer and sha256 are
            read from the files. Anchors recorded below the parent are taken out of chain.json: they were cut from what
            is being replaced.
        fill: writes the anchor's files into the folder it is given.

    Returns:
        the anchor.

    Raises:
        ValueError: the parent is not in the chain, `fill` wrote no model or another tokenizer than the chain's, or the
            record does not fit the files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    above = _anchors_down_to(folder, record)
    temporary = _fresh_folder(folder / f"{TEMPORARY}{Path(record['name']).name}")
    fill(temporary)
    drop_code(temporary)
    flush(temporary)
    written = _completed(folder, record, temporary)
    check_order([*above, written], folder / MANIFEST)
    check_one_tokenizer([*above, written], folder / MANIFEST)
    model_type = written.config().model_type
    if above:
        check_block_map(folder, written, above[-1])
        # First without the anchor, so that chain.json never lists a folder while it is being replaced.
        write_manifest(folder, _manifest(model_type, above))
    else:
        (folder / MANIFEST).unlink(missing_ok=True)
    _move_folder(temporary, folder / written.name)
    written = Anchor.of(written, folder / written.name)
    write_manifest(folder, _manifest(model_type, [*above, written]))
    return written


def _manifest(model_type: str, anchors: Sequence[AnchorRecord]) -> Manifest:
    return Manifest(model_type=model_type, versions=library_versions(), anchors=list(anchors))


def _anchors_down_to(folder: Path, record: Mapping[str, Any]) -> list[Anchor]:
    """The recorded anchors down to this one's parent."""
    if record.get("parent") is None:
        return []
    anchors = [Anchor.of(anchor, folder / anchor.name) for anchor in read_manifest(folder).anchors]
    names = [other.name for other in anchors]
    if record["parent"] not in names:
        raise ValueError(
            f"{folder / MANIFEST}: anchor {record['name']!r} has the parent {record['parent']!r}, which is not there. "
            f"Anchors: {', '.join(names)}."
        )
    return anchors[: names.index(record["parent"]) + 1]


def _hashes(folder: Path) -> dict[str, str]:
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    hashed = [name for name in files if name not in CARD_FILES]
    return {name: sha256_of(files[name]) for name in Progress("Hashing files", hashed, unit="files")}


def _fresh_folder(folder: Path) -> Path:
    """An empty folder, what an earlier attempt left there removed."""
    _remove(folder)
    folder.mkdir(parents=True)
    return folder


def _move_folder(source: Path, target: Path) -> None:
    _remove(target)
    os.replace(source, target)


def _remove(path: Path) -> None:
    """A link is removed itself, and what it leads to left alone."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _completed(folder: Path, record: Mapping[str, Any], temporary: Path) -> Anchor:
    """The record, completed from the anchor's own files: shape, number of parameters, dtype, tokenizer and sha256."""
    files = _hashes(temporary)
    if "config.json" not in files or not weight_files(files):
        raise ValueError(
            f"{temporary} was filled without config.json or model.safetensors: an anchor is a model as "
            f"save_pretrained writes it. Files: {', '.join(files) or 'none'}."
        )
    architecture = describe(load_config(temporary, RESTORE))
    tensors, _ = read_header(temporary / weight_files(files)[0])
    kind = next(iter(tensors.values())).dtype
    if kind not in DTYPES:
        raise ValueError(
            f"{temporary / weight_files(files)[0]} holds {kind} weights. Chains store {', '.join(DTYPES.values())}: "
            "convert the model first."
        )
    blocks = record.get("blocks")
    found = {
        **record,
        "blocks": None if blocks is None else [_block_record(block) for block in blocks],
        "shape": architecture.shape,
        "num_parameters": architecture.num_parameters,
        "dtype": DTYPES[kind],
        "tokenizer_sha256": stored_tokenizer_hash(temporary),
        "files": files,
    }
    return Anchor.of(
        validated(AnchorRecord, found, folder / MANIFEST, "Change the record given to write_anchor.", defaults=True),
        temporary,
    )


def _block_record(block: Block | Sequence[int]) -> dict[str, Any]:
    if isinstance(block, Block):
        return {"layers": list(block.layers), "kept": block.kept, "cost": block.cost}
    return {"layers": list(block), "kept": block[-1]}


def copy_anchor(anchor: Anchor, folder: Path) -> None:
    """Copy the files of an anchor's record into another chain's folder."""
    temporary = _fresh_folder(folder / f"{TEMPORARY}{anchor.name}")
    copy_files(anchor, temporary)
    for name in CARD_FILES:
        if (anchor.path / name).is_file():
            shutil.copyfile(anchor.path / name, temporary / name)
    _move_folder(temporary, folder / anchor.name)


def copy_files(anchor: Anchor, folder: Path) -> None:
    """Copy the files of an anchor's record into a folder that has none of them."""
    anchor.need(*anchor.files)
    for name in anchor.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(anchor.path / name, folder / name)
