"""The launcher checks what a kernel would read and write before it is launched; no Triton needed."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from gxr_batch.engines.slots.gpu.launch import Launcher, Operand

F32 = (torch.float32,)


class Kernel:
    """Takes launches as a Triton kernel does."""

    __name__ = "double"

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda **arguments: self.launches.append((grid, arguments))


@pytest.fixture
def kernel():
    return Kernel()


def test_a_kernel_gets_its_operands_by_name_and_strides_where_asked(kernel):
    launch, x, out = Launcher(), torch.zeros(3, 8)[:, :5], torch.zeros(3, 5)
    operands = {"x": Operand(x, (3, 5), F32, stride="x_stride"), "out": Operand(out, (3, 5), F32), "bias": None}
    launch(kernel, (3,), operands, {"scale": 2.0}, {"BLOCK": 8}, warps=2, stages=1)
    [(grid, arguments)] = kernel.launches
    assert grid == (3,)
    assert arguments.pop("x") is x
    assert arguments.pop("out") is out
    options = {"num_warps": 2, "num_stages": 1, "enable_fp_fusion": True}
    assert arguments == {"x_stride": 8, "bias": None, "scale": 2.0, "BLOCK": 8, **options}
    assert launch.launches == {"double": 1}


def test_an_empty_grid_is_not_launched(kernel):
    launch = Launcher()
    launch(kernel, (0, 4), {"x": Operand(torch.zeros(0, 5), (0, 5), F32, stride="x_stride")}, {}, {})
    assert not kernel.launches
    assert not launch.launches


@pytest.mark.parametrize(
    ("operand", "message"),
    [
        (Operand(torch.zeros(3, 5), (3, 6), F32), r"double: x has shape \(3, 5\), expected \(3, 6\)"),
        (Operand(torch.zeros(3), (3,), (torch.int32,)), r"double: x is torch.float32 \(3,\), expected torch.int32"),
        (
            Operand(torch.zeros(3, 8)[:, :5], (3, 5), F32),
            r"double: x has shape \(3, 5\) and strides \(8, 1\), expected",
        ),
        (Operand(torch.zeros(5, 3).T, (3, 5), F32, stride="s"), r"double: x has shape \(3, 5\) and strides \(1, 3\)"),
        (Operand(torch.zeros(2, 3, 8)[..., :5], (2, 3, 5), F32, stride="s"), r"strides \(24, 8, 1\)"),
        (Operand(torch.empty(2**16, 2**15, device="meta"), (2**16, 2**15), F32), "its kernel's offsets have 32 bits"),
    ],
)
def test_a_wrong_operand_is_not_launched(kernel, operand, message):
    with pytest.raises(ValueError, match=message):
        Launcher()(kernel, (1,), {"x": operand}, {}, {})
    assert not kernel.launches


def test_a_kernel_with_64_bit_offsets_takes_large_operands(kernel):
    large = torch.empty(2**16, 2**15, device="meta")
    Launcher()(kernel, (1,), {"x": Operand(large, (2**16, 2**15), F32, wide=True)}, {}, {})


def test_operands_on_two_devices_are_not_launched(kernel):
    operands = {"x": Operand(torch.zeros(3), (3,), F32), "y": Operand(torch.zeros(3, device="meta"), (3,), F32)}
    with pytest.raises(ValueError, match="double: operands on 2 devices: cpu, meta"):
        Launcher()(kernel, (1,), operands, {}, {})


@pytest.mark.parametrize("grid", [(2**31,), (1, 65536), (1, 1, 65536), (1, 1, 1, 1)])
def test_a_grid_beyond_the_limits_of_cuda_is_not_launched(kernel, grid):
    with pytest.raises(ValueError, match="double: a grid of"):
        Launcher()(kernel, grid, {"x": Operand(torch.zeros(3), (3,), F32)}, {}, {})


def test_tensors_without_memory_are_counted_and_not_launched(kernel):
    launch = Launcher()
    with FakeTensorMode():
        fakes = torch.zeros(3), torch.zeros(3, device="meta")
    for tensor in (*fakes, torch.zeros(3, device="meta")):
        launch(kernel, (1,), {"x": Operand(tensor, (3,), F32)}, {}, {})
    assert not kernel.launches
    assert launch.launches == {"double": 3}


def test_float32_is_multiplied_without_matrix_units_as_is_everything_on_turing():
    half, single = torch.zeros(1, dtype=torch.float16), torch.zeros(1)
    assert Launcher(80).has_matrix_unit(half)
    assert not Launcher(80).has_matrix_unit(single)
    assert not Launcher(75).has_matrix_unit(half)
