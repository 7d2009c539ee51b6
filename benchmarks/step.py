"""What the IMM step costs beyond its network passes: `python -m benchmarks.step`, on CPU.

Peer: the same network's no-grad forward, forward and backward on the same inputs, measured in turn with the step in one
run. Prints ratios only; absolute times on a shared machine mean little. On a GPU: `python -m benchmarks.gpu`.
"""

import argparse
import statistics
from collections.abc import Sequence

from benchmarks.gpu.case import Case, matmul, matmul_flops
from benchmarks.gpu.timing import ratios, seconds
from imm_scale.models.dit import size_config

_MATMUL = 2048


def ratio(above: Sequence[float], below: Sequence[float]) -> str:
    """Median of the pairwise ratios, with the smallest and the largest."""
    values = ratios(above, below)
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def report_step(args: argparse.Namespace) -> None:
    case = Case(size_config(args.size), args.samples, "bf16", compiled=False)
    step, passes, loss = seconds([case.step, case.passes, case.loss_only], args.rounds)
    print(f"{args.size}, micro-batch {args.samples}, M = 4, bf16 autocast, eager")
    print(f"  IMM step / its three network passes   {ratio(step, passes)}   goal 1.03")
    print(f"  loss / IMM step                       {ratio(loss, step)}   goal 0.01")


def report_utilization(args: argparse.Namespace) -> None:
    print(f"achieved FLOP/s of the step over those of a {_MATMUL} matmul in the same precision")
    for precision in ("fp32", "bf16"):
        for compiled in (False, True):
            case = Case(size_config(args.size), args.samples, precision, compiled)
            step, peak = seconds([case.step, matmul(precision, _MATMUL)], args.rounds)
            work = case.step_flops / matmul_flops(_MATMUL)
            shares = [work * share for share in ratios(peak, step)]
            print(f"  {precision} {'compiled' if compiled else 'eager':<9} {statistics.median(shares):.2f}")


def report_particles(args: argparse.Namespace) -> None:
    print("IMM step with M particles / with M = 4, bf16")
    sizes, config = (2, 4, 8, 16), size_config(args.size)
    cases = [Case(config, args.samples, "bf16", compiled=False, particles=m) for m in sizes]
    times = seconds([case.step for case in cases], args.rounds)
    for m, values in zip(sizes, times, strict=True):
        print(f"  M = {m:<3} {ratio(values, times[1])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="DiT-S/2")
    parser.add_argument("--samples", type=int, default=16, help="micro-batch, a multiple of 16")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    report_step(args)
    report_particles(args)
    report_utilization(args)


if __name__ == "__main__":
    main()
