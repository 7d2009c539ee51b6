"""What a run can be told: the schema, and how YAML files and overrides become a Config."""

from imm_scale.config.load import (
    SCHEMA,
    Entry,
    Loaded,
    changed,
    explain,
    flatten,
    from_yaml,
    is_override,
    load,
    load_words,
    nearest_key,
    overview,
    settings_of,
    split_words,
    to_yaml,
    validate,
)

__all__ = [
    "SCHEMA",
    "Entry",
    "Loaded",
    "changed",
    "explain",
    "flatten",
    "from_yaml",
    "is_override",
    "load",
    "load_words",
    "nearest_key",
    "overview",
    "settings_of",
    "split_words",
    "to_yaml",
    "validate",
]
