"""Files that say labels: EDM's dataset.json, ImageNet's LOC_synset_mapping.txt, and the maps of --labels."""

import json
import os
import posixpath
import re
from collections.abc import Collection
from typing import Any

from data_tools.sources import names
from data_tools.sources.base import Labelled
from data_tools.sources.tree import Tree
from imm_scale.errors import UserError

EDM_NAME = "dataset.json"
SYNSETS_NAME = "LOC_synset_mapping.txt"
_PARENTS = 4  # from ILSVRC/Data/CLS-LOC/train up to where ImageNet's mapping lies
_SYNSET = re.compile(r"(n\d{8}) (.+)")


def from_dataset_json(tree: Tree, images: Collection[str]) -> Labelled | None:
    """Labels of dataset.json, {"labels": [[path, number], ...]} or null for none, if one lies above all images.

    Source of the format: dataset_tool.py of NVlabs/edm and StyleGAN.

    Args:
        images: the paths of those files that are images, in order.

    Raises:
        UserError: it is no JSON, or has labels that are no numbers.
    """
    above = [path for path in tree.files if path.split("/")[-1] == EDM_NAME]
    above = [path for path in above if all(image.startswith(path[: -len(EDM_NAME)]) for image in images)]
    if not above or not images:
        return None
    path = min(above, key=len)
    where = names.printable(tree.name(path))
    try:
        document = json.loads(tree.text(path))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} should say the labels but is no JSON ({error}): mend it or remove it") from error
    if not isinstance(document, dict) or "labels" not in document:
        return None
    base = path[: -len(EDM_NAME)]
    return _with_labels(tree, images, base, _labels(document["labels"], where))


def _labels(stored: Any, where: str) -> dict[str, int] | None:
    if stored is None:
        return None
    try:
        pairs = [(posixpath.normpath(str(path).replace("\\", "/")), label) for path, label in stored]
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: labels must be a list of [path, number] or null ({error})") from error
    if not pairs:
        raise UserError(f"{where}: labels is empty: list [path, number] of each image, or write null for no labels")
    labels: dict[str, int] = {}
    for path, label in pairs:
        if type(label) is not int:
            raise UserError(f"{where}: the label of {path} is {label!r}: a whole number is needed")
        if labels.setdefault(path, label) != label:
            raise UserError(f"{where}: {path} has the labels {labels[path]} and {label}: which is meant?")
    return labels


def _with_labels(tree: Tree, images: Collection[str], base: str, labels: dict[str, int] | None) -> Labelled:
    found = Labelled()
    for path in images:
        if labels is None:
            found.add(tree.name(path), 0, tree.files[path].image)
        elif path[len(base) :] in labels:
            found.add(tree.name(path), labels[path[len(base) :]], tree.files[path].image)
        else:
            found.left_out.add(f"images without a label in {EDM_NAME}", tree.name(path))
    there = {path[len(base) :] for path in tree.files}
    found.bad = [
        (tree.name(base + path), f"listed in {EDM_NAME}, but missing") for path in labels or () if path not in there
    ]
    return found


def titles(tree: Tree, classes: Collection[str]) -> dict[str, str]:
    """{"n01440764": "tench, Tinca tinca"} of a LOC_synset_mapping.txt, if it knows every class; else nothing."""
    inside = [path for path in tree.files if path.split("/")[-1] == SYNSETS_NAME]
    text = tree.text(min(inside, key=len)) if inside else tree.synsets
    known = {match[1]: match[2] for match in map(_SYNSET.fullmatch, (text or "").splitlines()) if match}
    return known if known and set(classes) <= known.keys() else {}


def synsets_above(path: str) -> str | None:
    """Text of a LOC_synset_mapping.txt in the folder of a file, in a folder, or in one of four above it."""
    folder = os.path.abspath(path)
    for _ in range(_PARENTS + 1):
        try:
            with open(os.path.join(folder, SYNSETS_NAME), encoding="utf-8", errors="replace") as file:
                return file.read()
        except OSError:  # not there, or not for us
            folder = os.path.dirname(folder)
    return None


def read_map(path: str) -> list[str]:
    """Class names by number, of a JSON {"0": name, ...} or of a LOC_synset_mapping.txt. Raises UserError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        lines = [_SYNSET.fullmatch(line) for line in text.splitlines() if line.strip()]
        if lines and all(lines):
            return [match[0] for match in lines if match]
        document = json.loads(text)
        if not isinstance(document, dict) or not document:
            raise ValueError("it names no class")
        return [str(document[str(i)]) for i in range(len(document))]
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise UserError(
            f'--labels {path}: {{"0": name, "1": name, ...}} or {SYNSETS_NAME} is needed ({error})'
        ) from error


def folder_name(class_name: str) -> str:
    """The folder of a class that is named "n01440764 tench, Tinca tinca"; any other name is its own."""
    match = _SYNSET.fullmatch(class_name)
    return match[1] if match else class_name
