"""Fields that share a line in a docstring, as in `step, images_seen: the clock`, get a row each in the API reference.

An extension of griffe, which would take the first name for a field and the others for its type.
"""

import re
from typing import Any

from griffe import Extension, Object

_SHARED = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)", re.MULTILINE)


class SharedDescriptions(Extension):
    """Rewrites docstrings before their sections are parsed."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = _SHARED.sub(_one_each, obj.docstring.value)


def _one_each(match: re.Match[str]) -> str:
    indent, names, text = match.groups()
    return "\n".join(f"{indent}{name}: {text}" for name in names.split(", "))
