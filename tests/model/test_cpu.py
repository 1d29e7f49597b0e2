"""dtype and packing follow what the processor has."""

import pytest
import torch

from serve_app.errors import ConfigError
from serve_app.model.cpu import can_pack, cpu_has_bf16, pick_dtype
from serve_app.model.layers import Linear
from tests.model.driver import CPU


def test_auto_is_bf16_where_it_is_native():
    assert pick_dtype(CPU) == (torch.bfloat16 if cpu_has_bf16() else torch.float32)
    assert pick_dtype(torch.device("cuda")) == torch.bfloat16


def test_a_named_dtype_is_taken_and_others_are_refused():
    assert pick_dtype(CPU, "float32") == torch.float32
    assert pick_dtype(CPU, "bfloat16") == torch.bfloat16
    with pytest.raises(ConfigError, match="'float16' is not one of"):
        pick_dtype(CPU, "float16")


def test_weights_are_packed_in_bf16_only():
    assert not can_pack(CPU, torch.float32)
    assert not can_pack(torch.device("cuda"), torch.bfloat16)
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    assert not Linear(weight, None, torch.float32, CPU).is_packed
    assert Linear(weight, None, torch.bfloat16, CPU).is_packed == can_pack(CPU, torch.bfloat16)


@pytest.mark.skipif(not can_pack(CPU, torch.bfloat16), reason="this processor takes no packed weights")
@pytest.mark.parametrize("num_rows", [1, 2, 7, 64, 300])
@pytest.mark.parametrize("has_bias", [False, True])
def test_packed_weights_give_the_bits_of_plain_ones(num_rows, has_bias):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(96, 192, generator=generator).bfloat16()
    bias = torch.randn(96, generator=generator).bfloat16() if has_bias else None
    x = torch.randn(num_rows, 192, generator=generator).bfloat16()
    packed = Linear(weight, bias, torch.bfloat16, CPU)(x)
    assert torch.equal(packed, torch.nn.functional.linear(x, weight, bias))
