"""The pretend accelerator is as strict as CUDA and as generous: what CUDA refuses raises, what it takes passes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.elsewhere import on_accelerator

DEVICE = "pretend"
Work = list[Callable[[], object]]


def here(*shape: int) -> Tensor:
    return torch.ones(shape)


def there(*shape: int) -> Tensor:
    return torch.ones(shape, device=DEVICE)


def place_there(*indices: int) -> Tensor:
    return torch.tensor(indices, device=DEVICE)


def set_item(tensor: Tensor, index: Any, value: Any) -> Tensor:
    tensor[index] = value
    return tensor


REFUSED: dict[str, Callable[[], object]] = {
    "a sum": lambda: there(3) + here(3),
    "a sum, the CPU's first": lambda: here(3) + there(3),
    "a sum of unequal shapes": lambda: there(2, 3) + here(1),
    "a number of the device into a CPU tensor's place": lambda: here(3).add_(there()),
    "a vector of the CPU and a number of the device": lambda: here(3) * there(),
    "a sum in place": lambda: there(3).add_(here(3)),
    "an out of the CPU": lambda: torch.add(there(3), there(3), out=here(3)),
    "two numbers of the CPU": lambda: torch.addcmul(there(3), torch.tensor(1.0), torch.tensor(2.0)),
    "a comparison": lambda: there(3) == here(3),
    "equal": lambda: torch.equal(there(3), here(3)),
    "allclose": lambda: torch.allclose(there(3), here(3)),
    "a matrix product": lambda: there(3, 3) @ here(3, 3),
    "linear": lambda: nn.functional.linear(there(2, 3), here(4, 3)),
    "cat": lambda: torch.cat([there(3), here(2)]),
    "stack": lambda: torch.stack([there(), here()]),
    "where, its condition": lambda: torch.where(here(3) > 0, there(3), there(3)),
    "where, a value": lambda: torch.where(there(3) > 0, there(3), here(3)),
    "masked_fill": lambda: there(3).masked_fill_(here(3) > 0, 0.0),
    "masked_scatter": lambda: there(3).masked_scatter(there(3) > 0, here(3)),
    "masked_select": lambda: there(3).masked_select(here(3) > 0),
    "index_select": lambda: there(3).index_select(0, torch.tensor([0])),
    "index_copy_, its index": lambda: there(3).index_copy_(0, torch.tensor([0]), there(1)),
    "index_copy_, its source": lambda: there(3).index_copy_(0, place_there(0), here(1)),
    "gather": lambda: there(3).gather(0, torch.tensor([0])),
    "scatter": lambda: there(3).scatter(0, place_there(0), here(1)),
    "isin": lambda: torch.isin(there(3), here(2)),
    "an embedding": lambda: nn.functional.embedding(torch.tensor([0]), there(3, 2)),
    "a CPU tensor at indices of the device": lambda: here(3)[place_there(0)],
    "a CPU tensor at a mask of the device": lambda: here(3)[there(3) > 0],
    "values of the CPU at indices": lambda: set_item(there(3), place_there(0, 1), here(2)),
    "values of the device into a CPU tensor at its indices": lambda: set_item(here(3), torch.tensor([0, 1]), there(2)),
    "softmax cross entropy": lambda: nn.functional.cross_entropy(there(2, 3), torch.tensor([0, 1])),
    "attention": lambda: nn.functional.scaled_dot_product_attention(there(1, 2, 8), there(1, 2, 8), here(1, 2, 8)),
}
Make = Callable[..., Tensor]
TAKEN: dict[str, Callable[[Make], Tensor]] = {  # of ``there``, and of ``here`` for what is right
    "a number of the CPU": lambda ones: ones(3) + torch.tensor(2.0),
    "a number of the CPU, first": lambda ones: torch.tensor(2.0) * ones(3),
    "a number of Python": lambda ones: 2 * ones(3) + 1,
    "where between numbers of Python": lambda ones: torch.where(ones(3) > 0, 1.0, 0.0),
    "where between numbers of the CPU": lambda ones: torch.where(ones(3) > 0, torch.tensor(1.0), torch.tensor(0.0)),
    "masked_fill with a number of the CPU": lambda ones: ones(3).masked_fill(ones(3) > 0, torch.tensor(2.0)),
    "fill_ with a number of the CPU": lambda ones: ones(3).fill_(torch.tensor(2.0)),
    "copy_ from the CPU": lambda ones: ones(3).copy_(here(3)),
    "CPU indices": lambda ones: ones(3)[torch.tensor([0, 2])],
    "a CPU mask": lambda ones: ones(3)[here(3) > 0],
    "a list of indices": lambda ones: ones(3)[[0, 2]],
    "a list of indices beside a slice": lambda ones: ones(3, 2)[[0, 2], :1],
    "values at CPU indices": lambda ones: set_item(ones(3), torch.tensor([0, 2]), 2 * ones(2)),
    "values at a list of indices": lambda ones: set_item(ones(3), [0, 2], 2 * ones(2)),
    "a number of the CPU at indices": lambda ones: set_item(ones(3), ones(1).long(), torch.tensor(2.0)),
    "values of the CPU at a slice, which is a copy": lambda ones: set_item(ones(3), slice(2), 2 * here(2)),
    "a number of Python at a mask": lambda ones: set_item(ones(3), ones(3) > 0, 2.0),
}
MADE: tuple[Callable[[], Tensor], ...] = (
    lambda: torch.tensor([1, 2], device=DEVICE),
    lambda: torch.tensor(2.5, device=DEVICE),
    lambda: torch.as_tensor([1], device=DEVICE),
    lambda: torch.as_tensor(here(2), device=DEVICE),
    lambda: torch.arange(4, device=DEVICE),
    lambda: torch.linspace(0, 1, 3, device=DEVICE),
    lambda: torch.eye(3, device=DEVICE),
    lambda: torch.empty(0, device=DEVICE),
    lambda: torch.full((2,), 3, device=DEVICE),
    lambda: torch.rand(3, device=DEVICE),
    lambda: torch.zeros_like(here(2), device=DEVICE),
    lambda: there(2).new_tensor([1]),
    lambda: there(2).new_zeros(3),
    lambda: torch.ones_like(there(2)),
    lambda: torch.tensor(there(2)),
    lambda: torch.stack([there(2), there(2)]),
    lambda: there(4).view(2, 2).t(),
    lambda: there(4).data,
    lambda: there(4).nonzero(),
    lambda: there(2).to(torch.bfloat16),
    lambda: here(2).to(DEVICE),
)


@on_accelerator
def test_what_cuda_refuses_to_mix_raises() -> None:
    for mixture, mix in REFUSED.items():
        assert "device" in why_refused(mix), mixture


def why_refused(mix: Callable[[], object]) -> str:
    try:
        mix()
    except RuntimeError as error:
        return str(error)
    return "it passes"


@on_accelerator
def test_what_cuda_mixes_passes_and_is_right() -> None:
    for mixture, mix in TAKEN.items():
        made = mix(there)
        assert made.device == torch.device("pretend:0"), mixture
        assert made.cpu().equal(mix(here)), mixture


@on_accelerator
def test_what_is_made_there_is_there() -> None:
    for number, make in enumerate(MADE):
        made = make()
        assert made.device == torch.device("pretend:0"), number
        assert made.cpu().shape == made.shape, number


@on_accelerator
def test_a_copy_to_the_cpu_is_a_tensor_of_the_cpu_and_memory_of_its_own() -> None:
    tensor = there(3)
    copied = here(3).copy_(tensor)
    for copy_ in (tensor.cpu(), tensor.to("cpu"), tensor.to(torch.device("cpu")), copied):
        assert type(copy_) is Tensor
        assert copy_.device.type == "cpu"
        copy_.zero_()
    assert tensor.tolist() == [1.0, 1.0, 1.0]
    assert (tensor.sum().item(), int(tensor[0]), bool(tensor.all())) == (3.0, 1, True)


@on_accelerator
def test_numpy_cannot_read_it() -> None:
    import numpy as np

    reads: Work = [lambda: there(3).numpy(), lambda: np.asarray(there(3)), lambda: there(3).detach().numpy()]
    for read in reads:
        with pytest.raises(TypeError, match="can't convert pretend:0 device type tensor to numpy"):
            read()


@on_accelerator
def test_a_generator_serves_its_own_device_only() -> None:
    ours, theirs = torch.Generator(DEVICE).manual_seed(1), torch.Generator().manual_seed(1)
    wrong_there: Work = [
        lambda: torch.rand(3, device=DEVICE, generator=theirs),
        lambda: torch.randperm(3, device=DEVICE, generator=theirs),
        lambda: there(3).exponential_(generator=theirs),
        lambda: torch.multinomial(there(3), 1, generator=theirs),
    ]
    for draw in wrong_there:
        with pytest.raises(RuntimeError, match="Expected a 'pretend' device type for generator but found 'cpu'"):
            draw()
    wrong_here: Work = [
        lambda: torch.rand(3, generator=ours),
        lambda: torch.randint(3, (2,), generator=ours),
        lambda: here(3).exponential_(generator=ours),
    ]
    for draw in wrong_here:
        with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for generator but found 'pretend'"):
            draw()
    drawn = torch.rand(3, device=DEVICE, generator=ours)
    assert drawn.device.type == DEVICE
    state = ours.get_state()
    again = [torch.rand(3, device=DEVICE, generator=ours.set_state(state)) for _ in range(2)]
    assert again[0].equal(again[1])
    assert not again[0].equal(drawn)


@on_accelerator
def test_what_draws_without_a_generator_leaves_the_cpu_s_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = torch.rand(3, device=DEVICE)
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(3)
    assert torch.rand(3, device=DEVICE).equal(first)


@on_accelerator
def test_there_is_one_and_it_is_the_accelerator() -> None:
    assert torch.accelerator.current_accelerator(check_available=True) == torch.device(DEVICE)
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.empty(1, device="pretend:1")


@on_accelerator
def test_changing_a_shape_in_place_is_refused_rather_than_lost() -> None:
    changes: Work = [lambda: there(3).unsqueeze_(0), lambda: there(3, 3).t_(), lambda: there(3).resize_(4)]
    for change in changes:
        with pytest.raises(NotImplementedError, match="cannot change its shape or type in place"):
            change()


@on_accelerator
def test_modules_move_train_and_are_copied() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.LayerNorm(8), nn.Linear(8, 2))
    theirs = copy.deepcopy(ours).to(DEVICE)
    input_BD = torch.randn(3, 4)
    for model, batch_BD in ((ours, input_BD), (theirs, input_BD.to(DEVICE))):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(batch_BD).pow(2).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    copied = copy.deepcopy(theirs)
    for ours_, theirs_, copied_ in zip(ours.parameters(), theirs.parameters(), copied.parameters(), strict=True):
        assert theirs_.device == copied_.device == torch.device("pretend:0")
        assert isinstance(copied_, nn.Parameter)
        assert copied_.requires_grad
        torch.testing.assert_close(theirs_.detach().cpu(), ours_.detach())
        with torch.no_grad():
            copied_.zero_()
        assert theirs_.detach().abs().max() > 0, "the copy has memory of its own"


@on_accelerator
def test_a_recomputed_layer_has_the_same_gradient() -> None:
    from torch.utils.checkpoint import checkpoint

    layer = nn.Linear(4, 4).to(DEVICE)
    input_BD = torch.randn(3, 4).to(DEVICE)
    gradients = []
    ways: list[Callable[[], Tensor]] = [
        lambda: layer(input_BD),
        lambda: checkpoint(layer, input_BD, use_reentrant=False),
    ]
    for way in ways:
        layer.zero_grad()
        way().pow(2).sum().backward()
        assert layer.weight.grad is not None
        gradients.append(layer.weight.grad.clone())
    assert gradients[0].equal(gradients[1])


@on_accelerator
def test_autocast_casts_what_cuda_s_casts() -> None:
    """Products in 16 bits, what loses digits in fp32, and what is fp64 or on the CPU not at all."""
    wide, narrow = there(4, 4), there(4, 4).to(torch.bfloat16)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        for product in (wide @ narrow, nn.functional.linear(wide, narrow), torch.bmm(wide[None], wide[None])):
            assert product.dtype == torch.bfloat16
        for function in (torch.exp, torch.log, torch.rsqrt, lambda x: x.pow(2), lambda x: x.softmax(-1), torch.sum):
            assert function(narrow).dtype == torch.float32
        assert (narrow + narrow).dtype == torch.bfloat16
        assert (wide.double() @ wide.double()).dtype == torch.float64
        assert (here(4, 4) @ here(4, 4)).dtype == torch.float32
        with torch.autocast(DEVICE, enabled=False):
            assert (wide @ wide).dtype == torch.float32
    assert (wide @ wide).dtype == torch.float32
