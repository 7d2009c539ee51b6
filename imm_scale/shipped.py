"""Files that come with the package, each found by its name without .yaml: recipes, sweep files, cluster sites.

`configs/` stands at the top of a checkout, where imm_scale/configs is a link to it; in a wheel it is a folder there.
"""

import difflib
import os
from typing import Literal

Kind = Literal["recipe", "sweep", "cluster"]
_CONFIGS = os.path.realpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs"))
_FOLDERS: dict[Kind, str] = {
    "recipe": _CONFIGS,
    "sweep": os.path.join(_CONFIGS, "sweep"),
    "cluster": os.path.join(_CONFIGS, "cluster"),
}


def names(kind: Kind) -> list[str]:
    """What comes along of a kind, in alphabetical order."""
    return sorted(entry.removesuffix(".yaml") for entry in os.listdir(_FOLDERS[kind]) if entry.endswith(".yaml"))


def find(kind: Kind, name: str) -> str | None:
    """The path of the file of that name; None where none comes along, or the word is a path or an override."""
    path = os.path.join(_FOLDERS[kind], f"{name}.yaml")
    return path if name == os.path.basename(name) and os.path.isfile(path) else None


def known(kind: Kind, name: str) -> str:
    """For the message about an unknown name: the nearest, and all there are."""
    there = names(kind)
    nearest = difflib.get_close_matches(name, there, n=1)
    return (f"did you mean {nearest[0]}? " if nearest else "") + f"there are {', '.join(there)}"
