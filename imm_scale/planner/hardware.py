"""GPUs and links as their makers state them: what the planner's roofline stands on. Nothing here was measured by us.

Peaks are dense (no structured sparsity), in FLOP/s with a multiply-add counted twice; bandwidths in bytes/s, links in
one direction. Sources, a line per row: data sheets and white papers named in `source`.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from imm_scale.errors import UserError

_GIB = 1 << 30
_TERA = 1e12
_GIGA = 1e9


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        memory: bytes on the device.
        bandwidth: of that memory.
        half, tf32, fp32: peak of matrix products in bf16 and fp16, in TF32, and in plain fp32.
        intra: bytes/s to its neighbours in the node, in one direction (NVLink, else PCIe).
        bf16: whether it computes in bf16 at all.
    """

    name: str
    memory: float
    bandwidth: float
    half: float
    tf32: float
    fp32: float
    intra: float
    source: str
    bf16: bool = True

    def peak(self, precision: str) -> float:
        """FLOP/s of matrix products in a `precision` of the config."""
        return {"fp32": self.fp32, "tf32": self.tf32}.get(precision, self.half)


@dataclass(frozen=True)
class Link:
    """A network between nodes.

    Attributes:
        bandwidth: bytes/s in one direction of one port.
        per_gpu: whether each GPU has a port of its own; otherwise the node has one for all.
    """

    name: str
    bandwidth: float
    per_gpu: bool
    source: str

    def per_node(self, gpus_per_node: int) -> float:
        """Bytes/s that a node sends."""
        return self.bandwidth * (gpus_per_node if self.per_gpu else 1)


def _gpu(
    name: str,
    gib: int,
    bandwidth: float,
    peaks: tuple[float, float, float],
    intra: float,
    source: str,
    bf16: bool = True,
) -> Gpu:
    half, tf32, fp32 = (peak * _TERA for peak in peaks)
    return Gpu(name, gib * _GIB, bandwidth * _GIGA, half, tf32, fp32, intra * _GIGA, source, bf16)


# name, GiB, memory GB/s, (half, TF32, fp32) TFLOP/s, GB/s to neighbours one way. Where a GPU has no TF32, its fp32.
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("v100-32gb", 32, 900, (125, 15.7, 15.7), 150, "NVIDIA V100 data sheet, SXM2: NVLink 300 GB/s", bf16=False),
        _gpu("a100-40gb", 40, 1555, (312, 156, 19.5), 300, "NVIDIA A100 data sheet, SXM4: NVLink 600 GB/s"),
        _gpu("a100-80gb", 80, 2039, (312, 156, 19.5), 300, "NVIDIA A100 data sheet, SXM4: NVLink 600 GB/s"),
        _gpu("h100-80gb", 80, 3350, (989.4, 494.7, 66.9), 450, "NVIDIA H100 white paper, SXM5: NVLink 900 GB/s"),
        _gpu("h100-pcie", 80, 2000, (756, 378, 51.2), 64, "NVIDIA H100 white paper, PCIe Gen5 128 GB/s"),
        _gpu("h200-141gb", 141, 4800, (989.4, 494.7, 66.9), 450, "NVIDIA H200 data sheet, SXM: NVLink 900 GB/s"),
        _gpu("b200-180gb", 179, 8000, (2250, 1100, 80), 900, "NVIDIA Blackwell brief, HGX B200: NVLink 1.8 TB/s"),
        _gpu("l40s-48gb", 48, 864, (362, 183, 91.6), 32, "NVIDIA L40S data sheet: PCIe Gen4 64 GB/s"),
        _gpu("l4-24gb", 24, 300, (121, 60, 30.3), 32, "NVIDIA L4 data sheet: PCIe Gen4 64 GB/s"),
        _gpu("rtx4090-24gb", 24, 1008, (165.2, 82.6, 82.6), 32, "NVIDIA Ada white paper, fp32 sums: PCIe Gen4"),
    )
}

LINKS: dict[str, Link] = {
    link.name: link
    for link in (
        Link("ib-hdr", 25 * _GIGA, True, "InfiniBand HDR, 200 Gb/s a port, a port per GPU (as DGX A100)"),
        Link("ib-ndr", 50 * _GIGA, True, "InfiniBand NDR, 400 Gb/s a port, a port per GPU (as DGX H100)"),
        Link("efa-p4d", 50 * _GIGA, False, "AWS EFA, 400 Gb/s a node (p4d, p4de)"),
        Link("efa-p5", 400 * _GIGA, False, "AWS EFA, 3,200 Gb/s a node (p5, p5e)"),
        Link("eth-100g", 12.5 * _GIGA, False, "Ethernet, 100 Gb/s a node"),
        Link("eth-25g", 3.125 * _GIGA, False, "Ethernet, 25 Gb/s a node"),
        Link("eth-10g", 1.25 * _GIGA, False, "Ethernet, 10 Gb/s a node"),
    )
}
DEFAULT_LINK = "ib-hdr"

_Row = TypeVar("_Row", Gpu, Link)


def _find(table: Mapping[str, _Row], name: str, what: str) -> _Row:
    if name in table:
        return table[name]
    near = [known for known in table if known.startswith(name.lower())]
    near = near or difflib.get_close_matches(name.lower(), table, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(table)}"
    raise UserError(f"{what} {name!r} is unknown; {hint}")


def gpu(name: str) -> Gpu:
    """A row of the table. Raises UserError with the nearest names."""
    return _find(GPUS, name, "--gpu")


def link(name: str | None) -> Link:
    """A row of the table, or the default one. Raises UserError with the nearest names."""
    return _find(LINKS, name or DEFAULT_LINK, "--link")
