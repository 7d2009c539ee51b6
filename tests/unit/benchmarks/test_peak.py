"""Names as NVIDIA's driver gives them, and the row of the data sheets each belongs to."""

import pytest

from benchmarks.gpu.peak import data_sheet

GIB = 1 << 30


@pytest.mark.parametrize(
    ("name", "gib", "row"),
    [
        ("NVIDIA H100 80GB HBM3", 79.1, "h100-80gb"),
        ("NVIDIA H100 PCIe", 79.1, "h100-pcie"),
        ("NVIDIA H200", 139.8, "h200-141gb"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", 79.2, "a100-80gb"),
        ("Tesla V100-SXM2-32GB", 31.7, "v100-32gb"),
        ("NVIDIA B200", 178.4, "b200-180gb"),
        ("NVIDIA L4", 22.0, "l4-24gb"),
        ("NVIDIA L40S", 44.4, "l40s-48gb"),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx4090-24gb"),
    ],
)
def test_a_name_finds_its_row(name, gib, row):
    sheet = data_sheet(name, gib * GIB)
    assert sheet is not None and sheet.name == row


@pytest.mark.parametrize(
    "name", ["NVIDIA H100 NVL", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA T4"]
)
def test_a_gpu_with_other_figures_finds_none(name):
    assert data_sheet(name, 80 * GIB) is None
