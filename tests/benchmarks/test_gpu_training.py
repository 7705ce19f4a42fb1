"""Peaks of cards by the names that CUDA gives them."""

from __future__ import annotations

import pytest

from benchmarks.gpu_training import peak_tflops


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", 989.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX A4000", None),
        ("Tesla T4", None),
    ],
)
def test_a_card_has_its_own_peak_or_none(name: str, expected: float | None) -> None:
    assert peak_tflops(name) == expected
