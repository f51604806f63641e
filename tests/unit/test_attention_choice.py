"""Which attention kernels a model gets, and what is said when a wish can't be met."""

import pytest
import torch

from baton.proto.errors import UserError
from baton.worker.attention import choose_ops
from baton.worker.attention.gpu import HOPPER, Machine, choose
from baton.worker.attention.model import Model

LLAMA = Model(torch.bfloat16, 128)
H100 = Machine(HOPPER, "3.6.0", fa3=False)
H100_WITH_FA3 = Machine(HOPPER, "3.6.0", fa3=True)


def test_our_own_kernels_need_no_extra() -> None:
    assert not choose(LLAMA, "auto", H100).fa3
    assert not choose(LLAMA, "triton", H100_WITH_FA3).fa3


def test_the_fast_kernel_takes_16_bits_on_hopper() -> None:
    assert choose(LLAMA, "auto", H100).tiles == "gluon"
    assert choose(LLAMA, "auto", Machine((8, 0), "3.6.0", False)).tiles == "triton"
    assert choose(LLAMA, "auto", Machine(HOPPER, "3.7.0", False)).tiles == "triton"
    assert choose(Model(torch.float32, 128), "auto", H100).tiles == "triton"
    assert choose(Model(torch.bfloat16, 128, batch_invariant=True), "auto", H100).tiles == "triton"


def test_the_extra_is_used_when_asked_for() -> None:
    assert choose(LLAMA, "fa3", H100_WITH_FA3).fa3


@pytest.mark.parametrize(
    ("model", "machine", "message"),
    [
        (LLAMA, H100, r"pip install 'baton-serve\[fa3\]'"),
        (LLAMA, Machine((10, 0), "3.6.0", True), r"needs a Hopper GPU .*, not 10\.0"),
        (Model(torch.float32, 128), H100_WITH_FA3, "not float32; see --dtype"),
        (Model(torch.bfloat16, 100), H100_WITH_FA3, "multiple of 8, not 100"),
        (Model(torch.bfloat16, 128, soft_cap=True), H100_WITH_FA3, "no soft cap"),
        (Model(torch.bfloat16, 128, batch_invariant=True), H100_WITH_FA3, "does not keep --batch-invariant"),
    ],
)
def test_a_wish_that_can_not_be_met_is_one_clear_error(model: Model, machine: Machine, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose(model, "fa3", machine)
    assert not choose(model, "auto", machine).fa3


def test_backends_are_for_gpus() -> None:
    with pytest.raises(UserError, match="--attention-backend fa3 runs on a GPU"):
        choose_ops("cpu", Model(torch.float32, 64), "fa3")
