"""The sections of `make gpu`, in the order they run: proofs first, then timings in order of worth."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu.report import Context, Report


@dataclass(frozen=True)
class Section:
    """A module of this package with a function `run(context, report)`.

    Importing the module must not touch the GPU: it happens while the section before still runs.

    Attributes:
        limit: seconds it may take at full size on one H100; of all proofs and of all timings at most 600 each.
        memory: GiB of GPU memory it needs at full size; with less it is skipped.
        module: where `run` is; "" for this package's module of the section's name.
    """

    name: str
    limit: int
    what: str
    memory: int = 2
    module: str = ""

    def load(self) -> Callable[[Context, Report], None]:
        return importlib.import_module(self.module or f"benchmarks.gpu.{self.name}").run


# Limits are about twice what a section took on the one machine it has run on, whose host compiles slowly (docs/gpu.md);
# those that came to no end there have an estimate. Proofs and timings each fit into ten minutes.
PROOFS = (
    Section("versions", 25, "versions, NCCL, what the doctor says"),
    Section("draws", 40, "draws on the device equal those on the CPU"),
    Section("loss", 45, "losses and gradients in fp32 against fp64 on the CPU"),
    Section("conditioning", 8, "embeddings tell t from r, in tf32 as in fp64"),
    Section("branches", 70, "both branches in 16 bits: every gradient, no recompilation"),
    Section("tangent", 45, "derivatives along a tangent: error against fp64, time over a forward, memory", memory=20),
    Section(
        "heads", 35, "heads of token nets and kept keys against fp64 and one pass; their time and memory", memory=16
    ),
    Section("streams", 70, "nets of several blocks: masks that skip against dense ones, kept blocks", memory=32),
    Section("stages", 80, "ZeRO stages, precisions, offload, checkpointing, compile against stage 0 in fp32"),
    Section("overflow", 25, "fp16 overflows are skipped, a group that is not finite is named"),
    Section("memory", 20, "memory comes back when an engine is closed"),
    Section("train", 80, "train: signal, resume at another stage, a micro-batch too large", memory=30),
)
TIMINGS = (
    Section("syncs", 100, "host synchronizations, launches and idle share of a step"),
    Section("step", 120, "a step of XL, L, B and S: time, utilization, over its three passes"),
    Section("stock", 60, "the pair of passes beside diffusers' DiT"),
    Section("sampling", 90, "samplers in fp32, tf32 and bf16, eager and compiled: rate and error"),
    Section("attention", 30, "attention kernels at head sizes 72 and 64"),
    Section("overlap", 30, "ZeRO stages with overlap on and off, the optimizer's step"),
    Section("checkpoint", 60, "a checkpoint: memory, copy, wait, steps beside it"),
    Section("loader", 25, "loader to device against what a step needs"),
)
SECTIONS: tuple[Section, ...] = PROOFS + TIMINGS
GROUPS = {"proofs": PROOFS, "timings": TIMINGS}


def limit_of(name: str) -> int:
    """Seconds of a section."""
    return next(section.limit for section in SECTIONS if section.name == name)
