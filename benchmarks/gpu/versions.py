"""What is installed, what the doctor says of it, and whether NCCL answers."""

import torch
import torch.distributed as dist

from benchmarks.gpu import abilities, machine
from benchmarks.gpu.report import Context, Report
from imm_scale import doctor
from imm_scale.parallel import world
from imm_scale.parallel.world import World


def run(context: Context, report: Report) -> None:
    for name, value in machine.describe().items():
        if value is None:
            report.skip(name, "not here")
        else:
            report.figure(name, value if isinstance(value, float | int) else str(value))
    for finding in doctor.check_software():
        report.figure(f"doctor: {finding.name}", f"{finding.verdict} {finding.observation}")
        report.check(f"doctor: {finding.name} can be trained with", finding.verdict != "FAIL", equals=True)
    _missing(context, report)
    world.init(World())
    report.check("backend of the process group", dist.get_backend(), equals="gloo" if context.small else "nccl")
    report.check("all-reduce over one rank gives back what came in", _all_reduced(context.device), equals=True)
    world.shutdown()


def _missing(context: Context, report: Report) -> None:
    """What later sections will skip, said here once."""
    for what, why in (
        ("compile", abilities.lacks_compiler(context)),
        ("xformers", abilities.lacks_xformers(context)),
        ("bf16", abilities.lacks_precision(context, "bf16")),
        ("tf32", abilities.lacks_precision(context, "tf32")),
    ):
        if why:
            report.skip(what, why)


def _all_reduced(device: torch.device) -> bool:
    values = torch.arange(1 << 16, device=device, dtype=torch.float32)
    before = values.clone()
    dist.all_reduce(values)
    return torch.equal(values, before)
