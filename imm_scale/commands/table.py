"""All commands of `imm-scale`, in the order of the work, and the parser made of them."""

import argparse
import importlib
from collections.abc import Collection
from typing import NamedTuple

from imm_scale.commands.base import Command


class Entry(NamedTuple):
    """Where a command is defined, as module:NAME, and its line in `imm-scale --help`."""

    place: str
    help: str

    def load(self) -> Command:
        module, _, name = self.place.partition(":")
        command: Command = getattr(importlib.import_module(module), name)
        return command


COMMANDS = {
    "pack": Entry("data_tools.commands:PACK", "Pack labelled images into shuffled WebDataset shards."),
    "encode": Entry("data_tools.commands:ENCODE", "Encode packed images to latent shards and their manifest."),
    "pack-tokens": Entry(
        "data_tools.tokens.command:PACK_TOKENS", "Pack texts or images as sequences of tokens, with their manifest."
    ),
    "verify": Entry("data_tools.commands:VERIFY", "Compare shards with their manifest, mend or adopt them."),
    "stats": Entry("data_tools.commands:STATS", "Print numbers about a data set, and draw a page of it."),
    "plan": Entry(
        "imm_scale.commands.plan:PLAN",
        "Say what a run needs on given machines: memory, traffic, time, and what would make it fit.",
    ),
    "train": Entry(
        "imm_scale.commands.train:TRAIN",
        "Train a run, or go on with it, under nothing, torchrun, deepspeed or srun.",
    ),
    "sample": Entry(
        "imm_scale.commands.sample:SAMPLE",
        "Draw images, under nothing or any launcher; the same command goes on when stopped.",
    ),
    "evaluate": Entry(
        "imm_scale.commands.evaluate:EVALUATE", "Measure samples, or a set of images, against a reference."
    ),
    "profile": Entry(
        "imm_scale.commands.profile:PROFILE",
        "Say from one held-out pass of a token model what drawing several tokens at once must cost.",
    ),
    "report": Entry(
        "imm_scale.commands.report:REPORT",
        "Write one self-contained HTML page about runs, or about a sweep and its laws.",
    ),
    "sweep": Entry("launchers.commands:SWEEP", "Run a whole study, on SLURM or here: many runs of one sweep file."),
    "submit": Entry("launchers.commands:SUBMIT", "Take a run, an encoding or an evaluation to SLURM in one line."),
    "status": Entry("launchers.commands:STATUS", "Say how a submitted run is doing: job, last step, starts."),
    "logs": Entry("launchers.commands:LOGS", "Show what the launcher and rank 0 of a submitted run print."),
    "cancel": Entry("launchers.commands:CANCEL", "End a submitted run's job; its ranks commit a checkpoint first."),
    "export": Entry(
        "imm_scale.commands.weights:EXPORT", "Write weights and model spec to one .safetensors file, or to a folder."
    ),
    "import": Entry(
        "imm_scale.commands.weights:IMPORT", "Read a checkpoint of the authors, without running anything in it."
    ),
    "doctor": Entry(
        "imm_scale.commands.doctor:DOCTOR",
        "Check what training needs, on this machine or these ranks; exit 1 if it cannot.",
    ),
    "explain": Entry(
        "imm_scale.commands.explain:EXPLAIN",
        "Say what config keys mean, their type, default, and where a value came from.",
    ),
    "completion": Entry(
        "imm_scale.commands.completion:COMPLETION", "Print a script that lets bash, zsh or fish complete commands."
    ),
}

_EPILOG = """\
examples:
  imm-scale pack --source digits --out data/digits/images
  imm-scale encode --images data/digits/images --out data/digits/latents --codec pixels
  imm-scale train demo
  imm-scale evaluate runs/demo/imm

Each command has examples of its own: imm-scale COMMAND --help."""


def make_parser(chosen: Collection[str]) -> argparse.ArgumentParser:
    """The parser of `imm-scale` with the arguments of the chosen commands; of the others it knows the name alone."""
    parser = argparse.ArgumentParser(
        prog="imm-scale",
        description="Few-step image generators by IMM, from images to reports, from a laptop to a cluster.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, entry in COMMANDS.items():
        command = commands.add_parser(name, help=entry.help, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name in chosen:
            _fill(command, entry)
    return parser


def _fill(parser: argparse.ArgumentParser, entry: Entry) -> None:
    command = entry.load()
    parser.description, parser.epilog = command.description or entry.help, command.examples
    command.add_arguments(parser)
    parser.set_defaults(action=command.run, refuse=parser.error, check=command.check, interrupted=command.interrupted)
