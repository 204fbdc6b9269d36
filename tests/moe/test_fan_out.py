"""The sum of gradients over several uses: in float32, rounded once, whatever order autograd takes."""

import torch

from dsmoe.moe.fan_out import fan_out


def used(x, order):
    """The gradient of x used three times, the uses made in this order; 256 + 1 + 1 is 258 only if it is added at once:
    bf16 has no 257 and rounds it back to 256."""
    parts = fan_out(x, 3)
    factors = (256.0, 1.0, 1.0)
    total = 0
    for i in order:
        total = total + (parts[i] * factors[i]).float().sum()
    (gradient,) = torch.autograd.grad(total, x)
    return gradient


def test_the_sum_is_rounded_once_and_does_not_depend_on_the_order():
    x = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        assert torch.equal(used(x, order), torch.full((4,), 258.0, dtype=torch.bfloat16)), order


def test_autograd_alone_would_round_twice():
    x = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    total = (x * 1.0).float().sum() + (x * 1.0).float().sum() + (x * 256.0).float().sum()
    (gradient,) = torch.autograd.grad(total, x)
    assert torch.equal(gradient, torch.full((4,), 256.0, dtype=torch.bfloat16))


def test_unused_uses_and_float64():
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    first, _, _ = fan_out(x, 3)
    assert torch.equal(torch.autograd.grad(first.sum() * 2, x)[0], torch.full((3,), 2.0, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda t: sum(n * part for n, part in enumerate(fan_out(t, 3))), (x,))
