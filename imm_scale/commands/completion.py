"""`imm-scale completion`: scripts for shells, made from the parser by shtab."""

import argparse
import re
from collections.abc import Iterator, Sequence

from imm_scale import shipped
from imm_scale.commands import table
from imm_scale.commands.base import Command

SHELLS = ("bash", "zsh", "fish")

# What stands in the place of a word, by the argument's name. `_CONFIG` and the like are functions of the scripts.
_FUNCTIONS = {"bash": "_imm_scale_{}", "zsh": "_imm_scale_{}", "fish": "(_imm_scale_{})"}
_COMPLETED_BY = {"positionals": "config", "sweep": "sweep", "cluster": "cluster", "gpu": "gpu", "link": "link"}
_FILES = ("source", "out", "manifest", "labels", "file", "reference", "make_reference", "page", "adopt")
_FOLDERS = ("run", "runs", "images", "dir", "vae", "figures", "gallery")

# Each offers the words, and files of the user's beside them. After the "=" of a key and the "/" of a folder no space
# belongs.
_BASH = """_imm_scale_{name}() {{
  compgen -W "{candidates}" -- "$1"
  compgen -f -X '!*.yaml' -- "$1"
  compgen -d -S / -- "$1"
}}"""
_ZSH = """_imm_scale_{name}() {{
  compadd -- {plain}
  compadd -S '' -- {keys}
  _files -g '*.(yaml|yml)'
}}"""
_FISH = """function _imm_scale_{name}
  printf '%s\\n' {candidates}
  __fish_complete_suffix .yaml
end"""
_TEMPLATES = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
_BASH_END = """
_imm_scale() {
  _shtab_imm_scale "$@"
  [[ ${#COMPREPLY[@]} = 1 && ${COMPREPLY[0]} == *[=/] ]] && compopt -o nospace 2>/dev/null
  return 0
}
complete -o bashdefault -F _imm_scale imm-scale"""


def _config_keys() -> list[str]:
    """Every key of a config, under whatever choices."""
    from imm_scale.config.keys import UNIONS, flatten
    from imm_scale.config.schema import Config

    keys = set(flatten(Config()))
    for section, registry in UNIONS.items():
        for name in registry.names():
            keys |= {f"{section}.{key}" for key in flatten(registry.config(name)())}
    return sorted(keys)


def _candidates() -> dict[str, Sequence[str]]:
    from imm_scale.planner import hardware

    return {
        "config": [*shipped.names("recipe"), *(f"{key}=" for key in _config_keys())],
        "sweep": shipped.names("sweep"),
        "cluster": shipped.names("cluster"),
        "gpu": list(hardware.GPUS),
        "link": list(hardware.LINKS),
    }


def _functions(shell: str) -> str:
    texts = []
    for name, candidates in _candidates().items():
        keys = [candidate for candidate in candidates if candidate.endswith("=")]
        plain = [candidate for candidate in candidates if candidate not in keys]
        texts.append(
            _TEMPLATES[shell].format(
                name=name, candidates=" ".join(candidates), plain=" ".join(plain), keys=" ".join(keys)
            )
        )
    return "\n".join(texts)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Arguments of a parser and of the parsers below it."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)


def script(shell: str) -> str:
    """The script for one of `SHELLS`."""
    import shtab

    parser = table.make_parser(table.COMMANDS)
    for action in _actions(parser):
        if action.dest in _COMPLETED_BY:
            name = _COMPLETED_BY[action.dest]
            action.complete = {key: form.format(name) for key, form in _FUNCTIONS.items()}  # type: ignore[attr-defined]
        elif action.dest in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.dest in _FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    text: str = shtab.complete(parser, shell, preamble=_functions(shell))
    # For an argument of many words shtab writes what zsh reads as one word that excludes all others.
    return re.sub(r'"\(\*\)::?', '"*:', text) if shell == "zsh" else text + (_BASH_END if shell == "bash" else "")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS)


def _run(args: argparse.Namespace) -> int:
    print(script(args.shell))
    return 0


COMPLETION = Command(
    _add_arguments,
    _run,
    """examples:
  imm-scale completion bash > ~/.local/share/bash-completion/completions/imm-scale
  imm-scale completion zsh > ~/.zfunc/_imm-scale
  imm-scale completion fish > ~/.config/fish/completions/imm-scale.fish

It knows the commands, their flags, recipes, sweeps, sites, GPUs, and the keys of a config. For zsh, fpath has to hold
the folder before compinit runs: fpath+=~/.zfunc in ~/.zshrc.""",
    interrupted="the same command starts over",
)
