"""What a run can be told: the schema, and how YAML files and overrides become a `Config`."""

from imm_scale.config.checks import metric_configs, validate
from imm_scale.config.explain import explain, overview
from imm_scale.config.keys import check_key, entries, flatten, is_section
from imm_scale.config.load import (
    Loaded,
    changed,
    from_yaml,
    is_override,
    load,
    load_text,
    load_words,
    settings_of,
    split_args,
    to_yaml,
    unfinished,
)
from imm_scale.config.moved import renamed
from imm_scale.config.schema import Config

__all__ = [
    "Config",
    "Loaded",
    "changed",
    "check_key",
    "entries",
    "explain",
    "flatten",
    "from_yaml",
    "is_override",
    "is_section",
    "load",
    "load_text",
    "load_words",
    "metric_configs",
    "overview",
    "renamed",
    "settings_of",
    "split_args",
    "to_yaml",
    "unfinished",
    "validate",
]
