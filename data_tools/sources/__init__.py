"""Where labelled images come from: class folders, ZIP files, tars, Parquet files, and two small sets."""

import os

from data_tools.sources import label_files, names, parquet, tar_archive, webdataset, zip_archive
from data_tools.sources.base import Image, Labelled, LeftOut, Slice, Source, ZipMember, read
from data_tools.sources.built_in import BUILT_IN
from data_tools.sources.classes import classify
from data_tools.sources.locate import Located, locate, without_ending
from data_tools.sources.numbering import number
from data_tools.sources.tar_archive import Entries
from data_tools.sources.tree import Tree
from imm_scale.errors import UserError

__all__ = ["BUILT_IN", "Image", "LeftOut", "Located", "Slice", "Source", "ZipMember", "find", "locate", "read"]


def find(located: Located, label_map: list[str] | None, image_column: str, label_column: str) -> Source:
    """The images of a source, with labels as numbers.

    Args:
        label_map: names of the classes 0, 1, ...; None takes the order of the source or of the names. Built-in sets
            have their own.
        label_column: Parquet column of labels, or key of a WebDataset's .json.

    Raises:
        UserError: no images, damaged files, or labels that do not match the map.
    """
    if located.kind == "built_in":
        return BUILT_IN[located.given[0]]()
    known = [label_files.folder_name(name) for name in label_map or ()]
    if located.tree is not None:
        samples = classify(located.tree, known)
    elif located.kind == "zip":
        samples = _together([(path, zip_archive.tree_of(path)) for path in located.files], known)
    elif located.kind == "tar":
        samples = _tars(located.files, known, label_column)
    else:
        samples = parquet.labelled(located.files, image_column, label_column)
    if not samples.images:
        raise UserError(_nothing(samples, located.where))
    return number(samples, label_map, located.where)


def _nothing(samples: Labelled, where: str) -> str:
    said = [f"{len(samples.bad)} unusable, the first {': '.join(samples.bad[0])}"] if samples.bad else []
    reasons = sorted(samples.left_out.reasons.items(), key=lambda item: -item[1][0])
    said += [f"{count} {reason}, as {example}" for reason, (count, example) in reasons[:3]]
    found = f" ({names.printable('; '.join(said))})" if said else ""
    return (
        f"no images in {where}{found}; it must be a folder or an archive with a folder per class, and of archives "
        "inside it only tars in tars are read"
    )


def _tars(files: list[str], known: list[str], label_column: str) -> Labelled:
    entries = {path: tar_archive.entries_of(path) for path in files}
    if not any(map(webdataset.is_shard, entries.values())):
        return _together([(path, _tree_of(path, one)) for path, one in entries.items()], known)
    samples = Labelled()
    for path, one in entries.items():
        samples.extend(webdataset.labelled(path, one, label_column))
    return samples


def _tree_of(path: str, entries: Entries) -> Tree:
    tree = Tree(path, left_out=entries.left_out, synsets=label_files.synsets_above(path))
    for name, place in entries.files.items():
        tree.add(name, place, place.size)
    for name in entries.folders:
        tree.add_folder(name)
    tree.add_links(entries.links)
    tree.keeps += entries.keeps
    return tree


def _together(trees: list[tuple[str, Tree]], known: list[str]) -> Labelled:
    """The classes of several archives. Of several, one whose images lie in no folder is a class, as ImageNet's are."""
    samples = Labelled()
    for path, tree in trees:
        stem = without_ending(os.path.basename(path)) if len(trees) > 1 else None
        part = classify(tree, known, stem)
        part.keeps += tree.keeps
        samples.extend(part)
    return samples
