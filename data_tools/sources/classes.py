"""From paths of files to classes: the same for folders, ZIP files and tars."""

import io
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from PIL import Image as Pillow

from data_tools.sources import label_files, names
from data_tools.sources.base import Labelled, LeftOut, read
from data_tools.sources.tree import Tree
from imm_scale.errors import UserError

_WEAK_FORMATS = {"TGA", "PCX", "DCX"}  # hardly anything in such a file says what it is
_SHOWN = 3  # names listed in a note
_HEAD = 1 << 18  # bytes by which most images are known


def classify(tree: Tree, known: Collection[str] = (), flat_class: str | None = None) -> Labelled:
    """The images of a tree with their classes.

    A class is a folder at the depth where images first divide into several folders, or lie themselves: README files
    and wrapper folders above do not count. A dataset.json as EDM writes it decides instead.

    Args:
        known: names of classes the user gives: folders of these names are classes, even if called "train".
        flat_class: the class of images that lie in no folder at all.

    Raises:
        UserError: classes named like splits of a data set, images without class folders, or a broken dataset.json.
    """
    images = _images(tree)
    samples = label_files.from_dataset_json(tree, images)
    if samples is None:
        root = class_root(images)
        if not any(is_inside(path, root) for path in images):
            return _flat(tree, images, flat_class)
        samples = _by_folder(tree, images, root, known)
    samples.left_out.merge(tree.left_out)
    return samples


def _images(tree: Tree) -> list[str]:
    """Paths of images in order, by their names or, where those say nothing, by their content."""
    paths = sorted(tree.files, key=names.raw)
    return [path for path in paths if names.is_image(path) or _is_image_by_content(tree, path)]


def _is_image_by_content(tree: Tree, path: str) -> bool:
    """Whether a file that may be an image by its name begins as one does."""
    image = tree.files[path].image
    assert not isinstance(image, np.ndarray)
    if names.is_other(path):
        return False
    try:
        head = read(image, _HEAD)
        return _opens(head) or (len(head) == _HEAD and _opens(read(image)))
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return False


def _opens(data: bytes) -> bool:
    formats = [name for name in names.FORMATS if name not in _WEAK_FORMATS]
    try:
        with Pillow.open(io.BytesIO(data), formats=formats):
            return True
    except Pillow.DecompressionBombError:
        return True
    except (OSError, ValueError, SyntaxError, RuntimeError):
        return False


def class_root(images: list[str]) -> str:
    """The path, "" or with a slash at its end, below which the folders are classes."""
    root = ""
    while True:
        below = [path[len(root) :] for path in images if path.startswith(root)]
        heads = {path.split("/", 1)[0] for path in below if "/" in path}
        if len(heads) != 1:
            return root
        deeper = f"{heads.pop()}/"
        depths = Counter(path.count("/") > 1 for path in below if "/" in path)
        if depths[True] <= depths[False]:  # most images lie in that folder itself: it is a class
            return root
        root += deeper


def is_inside(path: str, root: str) -> bool:
    """Whether a file lies in a class folder below `root`, as `class_root` gives it."""
    return path.startswith(root) and "/" in path[len(root) :]


def _flat(tree: Tree, images: list[str], flat_class: str | None) -> Labelled:
    samples = Labelled(left_out=tree.left_out)
    if images and flat_class is None:
        raise UserError(
            f"{names.printable(tree.name(images[0]))} lies in no class folder: one folder of images per class is needed"
        )
    if not images:
        _leave_out_others(tree, images, samples.left_out)
    for path in images:
        assert flat_class is not None
        samples.add(tree.name(path), flat_class, tree.files[path].image)
        samples.folders.add(flat_class)
    return samples


def _by_folder(tree: Tree, images: list[str], root: str, known: Collection[str]) -> Labelled:
    samples = Labelled()
    classes: dict[str, list[str]] = {}
    for path in images:
        if is_inside(path, root):
            classes.setdefault(path[len(root) :].split("/", 1)[0], []).append(path)
    _check_splits(tree, root, classes, known)
    _check_links(tree, root)
    _leave_out(tree, images, root, classes, samples.left_out)
    samples.notes = _notes(tree, root, classes)
    for name in names.in_order(classes):
        for path in classes[name]:
            file = tree.files[path]
            samples.add(tree.name(path), name, file.image)
    samples.folders = set(classes) | _empty_folders(tree, root, known, samples.left_out)
    samples.titles = label_files.titles(tree, samples.folders)
    return samples


def _leave_out(tree: Tree, images: list[str], root: str, classes: Collection[str], left_out: LeftOut) -> None:
    """Counts what belongs to no class. Raises UserError if that are most of the images."""
    outside = [path for path in images if not is_inside(path, root)]
    if 2 * len(outside) > len(images):
        raise UserError(
            f"{tree.where}: {len(outside)} of {len(images)} images lie in no class folder, as "
            f"{names.printable(outside[0])}: put every image into the folder of its class"
        )
    if outside:
        left_out.add("images in no class folder", tree.name(outside[0]), len(outside))
    others = _leave_out_others(tree, images, left_out)
    heads = {path[len(root) :].split("/", 1)[0] for path in others if is_inside(path, root)}
    for head in sorted(heads - set(classes)):
        left_out.add("folders with files but no image", tree.name(root + head))


def _leave_out_others(tree: Tree, images: list[str], left_out: LeftOut) -> list[str]:
    """Counts files that are no images, and returns their paths."""
    others = sorted(tree.files.keys() - set(images), key=names.raw)
    for path in others:
        left_out.add(f"files that are no images ({names.suffix(path) or 'without an ending'})", tree.name(path))
    return others


def _empty_folders(tree: Tree, root: str, known: Collection[str], left_out: LeftOut) -> set[str]:
    """Names of class folders in which nothing is; one that is called after a split of the data set is no class."""
    level = {path[len(root) :] for path in tree.folders if path.startswith(root) and "/" not in path[len(root) :]}
    filled = {path[len(root) :].split("/", 1)[0] for path in tree.files if path.startswith(root)}
    splits = {name for name in level - filled if names.folder_split(name) and name not in known}
    for name in sorted(splits):
        left_out.add("empty folders called after splits of a data set", tree.name(root + name))
    return level - filled - splits


def _check_links(tree: Tree, root: str) -> None:
    """Raises UserError for links that may have been classes: without them the later ones would have other numbers."""
    for path, target in tree.broken_links.items():
        inside = path.startswith(root) and "/" not in path[len(root) :]
        if inside and not names.is_image(path) and not names.is_other(path):
            raise UserError(
                f"{names.printable(tree.name(path))}, beside folders that are classes, is a link that leads nowhere "
                f"(to {names.printable(target)}): mend or remove it"
            )


def _check_splits(tree: Tree, root: str, classes: dict[str, list[str]], known: Collection[str]) -> None:
    splits = [name for name in classes if names.folder_split(name) and name not in known]
    nested = [name for name in splits if all(path[len(root) :].count("/") > 1 for path in classes[name])]
    if len(splits) > 1 or nested or (splits and len(classes) == 1):
        one = f"as in --source {tree.where}/{root}{sorted(splits)[0]}" if tree.separator == "/" else "unpacked first"
        raise UserError(
            f"{tree.where}: the folders {', '.join(sorted(splits))} are splits of a data set by their names, not "
            f"classes: pack one of them at a time, {one}; if they are classes, name them in a map for --labels"
        )


# --- what may be meant otherwise than it is taken ---


def _notes(tree: Tree, root: str, classes: Mapping[str, Sequence[str]]) -> list[str]:
    """Sentences about classes, given the paths of their images, that look as if something else was meant."""
    inside = {name: _folders(paths, root) for name, paths in classes.items()}
    return [*_wrappers(tree, root, inside), *_splits(inside)]


def _folders(paths: Sequence[str], root: str) -> list[str]:
    """Names of the folders of a class in which its images lie, "" for the class itself."""
    below = (path[len(root) :].split("/") for path in paths)
    return sorted({parts[1] if len(parts) > 2 else "" for parts in below}, key=names.raw)


def _wrappers(tree: Tree, root: str, inside: Mapping[str, Sequence[str]]) -> list[str]:
    """A class of folders alone beside one of images, as data/cat, data/dog beside docs/logo.png."""
    if not any("" in folders for folders in inside.values()):
        return []
    wrappers = [name for name, folders in inside.items() if "" not in folders and len(folders) > 1]
    return [
        f"class {names.printable(name)} has its images in folders of its own ({_listed(inside[name])}), others have "
        f"theirs in themselves: if those folders are the classes, pack {names.printable(tree.name(root + name))} alone"
        for name in wrappers[:_SHOWN]
    ]


def _splits(inside: Mapping[str, Sequence[str]]) -> list[str]:
    """Classes divided into splits, as cat/train and cat/test."""
    found = sorted({name for folders in inside.values() for name in folders if names.folder_split(name)})
    if len({names.folder_split(name) for name in found}) < 2:
        return []
    return [
        f"classes hold folders called after splits of a data set ({_listed(found)}), which are packed together; for "
        "one of them alone, link or copy its images to a folder of its own"
    ]


def _listed(found: Sequence[str]) -> str:
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return names.printable(", ".join(found[:_SHOWN])) + more
