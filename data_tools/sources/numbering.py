"""From labels as a source says them to numbers 0, 1, ... and the names of classes."""

from collections import Counter

from data_tools.sources import label_files, names
from data_tools.sources.base import Labelled, Source
from imm_scale.errors import UserError

_MOST_CLASSES = 100_000  # without names for them; ImageNet-21k has 21,841


def number(found: Labelled, label_map: list[str] | None, where: str) -> Source:
    """Classes in the order of their names, or as the source numbers them, or as a label map does.

    Raises:
        UserError: labels of two kinds, numbers out of range, or labels that are not in the map.
    """
    kinds = {type(label) for label in found.labels}
    if len(kinds) > 1 and label_map is None:
        odd = Counter(type(label) for label in found.labels).most_common()[-1][0]
        i = next(i for i, label in enumerate(found.labels) if type(label) is odd)
        raise UserError(
            f"{where} has labels that are numbers and labels that are names, as {found.labels[i]!r} of "
            f"{names.printable(found.names[i])}: make them one kind, or give --labels"
        )
    if kinds == {int} and label_map is not None and found.class_names is not None:
        found = _by_name(found, label_map, where)
        kinds = {type(label) for label in found.labels}
    class_names, numbers = _numbers(found, label_map, where) if kinds == {int} else _names(found, label_map)
    for i, label in enumerate(found.labels):
        if label not in numbers:
            raise UserError(_unknown(found, i, len(class_names), where, label_map is not None))
    labels = [numbers[label] for label in found.labels]
    shown = [names.printable(name) for name in class_names]
    return Source(shown, found.names, labels, found.images, found.bad, found.left_out, found.notes, found.keeps)


def _by_name(found: Labelled, label_map: list[str], where: str) -> Labelled:
    """The names that the source has for its numbers as labels, unless they are those of the map anyway."""
    known = found.class_names or []
    if known == label_map:
        return found
    if len(set(known)) < len(known):
        raise UserError(f"--labels: {where} names several classes alike, so only its own order of classes can be kept")
    found.labels = [known[label] if 0 <= int(label) < len(known) else label for label in found.labels]  # type: ignore[index]
    return found


def _numbers(found: Labelled, label_map: list[str] | None, where: str) -> tuple[list[str], dict[int | str, int]]:
    most = max(int(label) for label in found.labels)
    class_names = label_map or found.class_names
    if label_map is not None and any(names.is_number(name) and int(name) != i for i, name in enumerate(label_map)):
        raise UserError(
            f"{where} has numbers as labels, and --labels names classes by numbers that are not their own: a label may "
            "mean the one or the other; give the classes other names in the map"
        )
    if class_names is None:
        if most >= _MOST_CLASSES:
            i = found.labels.index(most)
            raise UserError(
                f"label {most} of {names.printable(found.names[i])} would make {most + 1} classes of {where}: is it "
                "a label? Choose with --label-column, or name the classes with --labels"
            )
        class_names = [str(i) for i in range(most + 1)]
    return class_names, {i: i for i in range(len(class_names))}


def _names(found: Labelled, label_map: list[str] | None) -> tuple[list[str], dict[int | str, int]]:
    if label_map is None:
        classes = names.in_order({str(label) for label in found.labels} | found.folders)
        titles = found.titles
        return [f"{name} {titles[name]}" if name in titles else name for name in classes], {
            name: i for i, name in enumerate(classes)
        }
    if len(set(label_map)) < len(label_map):
        twice = Counter(label_map).most_common(1)[0][0]
        raise UserError(f"--labels names two classes {twice!r}: names of folders must say which class is meant")
    numbers: dict[int | str, int] = {}
    for i, name in enumerate(label_map):
        numbers |= {name: i, label_files.folder_name(name): i}
    # Names that are no text stand in a map as they are shown.
    for label in {*found.labels}:
        if label not in numbers and names.printable(str(label)) in numbers:
            numbers[label] = numbers[names.printable(str(label))]
    return label_map, numbers


def _unknown(found: Labelled, i: int, count: int, where: str, has_map: bool) -> str:
    label, name = found.labels[i], names.printable(found.names[i])
    if isinstance(label, int) and label < 0:
        return (
            f"label {label} of {name} is negative, as images without a label have it: leave such files out of "
            f"--source, which takes several files and patterns ({where} holds them)"
        )
    if has_map:
        return (
            f"label {label!r} of {name} is none of the {count} classes of the label map: add it there, or leave "
            "--labels out"
        )
    return f"label {label!r} of {name} is none of the {count} classes that {where} names"
