"""Which attention kernels a model gets, and what is said when a wish can't be met."""

import pytest
import torch

from baton.proto.errors import UserError
from baton.worker.attention import choose_ops
from baton.worker.attention.gpu import HOPPER, choose
from baton.worker.attention.model import Model

LLAMA = Model(torch.bfloat16, 128)


def test_our_own_kernels_need_no_extra() -> None:
    assert not choose(LLAMA, "auto", HOPPER, fa3_installed=False).fa3
    assert not choose(LLAMA, "triton", HOPPER, fa3_installed=True).fa3


def test_the_fast_kernel_takes_16_bits_on_hopper() -> None:
    assert choose(LLAMA, "auto", HOPPER, False).tiles == "gluon"
    assert choose(LLAMA, "auto", (8, 0), False).tiles == "triton"
    assert choose(Model(torch.float32, 128), "auto", HOPPER, False).tiles == "triton"


def test_the_extra_is_used_when_asked_for() -> None:
    assert choose(LLAMA, "fa3", HOPPER, fa3_installed=True).fa3


@pytest.mark.parametrize(
    ("model", "capability", "installed", "message"),
    [
        (LLAMA, HOPPER, False, r"pip install 'baton-serve\[fa3\]'"),
        (LLAMA, (10, 0), True, r"needs a Hopper GPU .*, not 10\.0"),
        (Model(torch.float32, 128), HOPPER, True, "not float32; see --dtype"),
        (Model(torch.bfloat16, 100), HOPPER, True, "multiple of 8, not 100"),
        (Model(torch.bfloat16, 128, soft_cap=True), HOPPER, True, "no soft cap"),
    ],
)
def test_a_wish_that_can_not_be_met_is_one_clear_error(
    model: Model, capability: tuple[int, int], installed: bool, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        choose(model, "fa3", capability, installed)
    assert not choose(model, "auto", capability, installed).fa3


def test_backends_are_for_gpus() -> None:
    with pytest.raises(UserError, match="--attention-backend fa3 runs on a GPU"):
        choose_ops("cpu", Model(torch.float32, 64), "fa3")
