"""The order of things in the expert-parallel layer: the shared expert, and its gradient, while rows are under way.

One process, whose group of one stands for any: what is recorded is when transfers begin and are waited for.
"""

from types import SimpleNamespace

import pytest
import torch

from dsmoe import ops
from dsmoe.base.presets import ModelSpec
from dsmoe.moe import MoE, dispatch, exchange
from dsmoe.runtime import distributed


class Recorder:
    """Stands in for runtime.distributed in a group of one rank, and notes what happens in which order."""

    def __init__(self) -> None:
        self.events = []

    def world_size(self, group):
        return 1

    def all_to_all(self, rows, group):
        self.events.append("counts")
        return rows

    def start_all_to_all(self, rows, send, receive, group):
        assert sum(send) == sum(receive) == len(rows)
        self.events.append("start")
        return distributed.Transfer(rows.clone(), SimpleNamespace(wait=lambda: self.events.append("wait")))

    def note(self, name, module):
        """Also record when a module runs forward, and when its gradient is made."""
        module.register_forward_hook(lambda *_: self.events.append(name))
        module.register_full_backward_hook(lambda *_: self.events.append(f"{name} gradient"))


@pytest.fixture
def recorder(monkeypatch):
    found = Recorder()
    for module in (dispatch, exchange):
        monkeypatch.setattr(module, "distributed", found)
    return found


def both(recorder=None):
    """Output and gradients of the layer; with a recorder through `across`, as the expert-parallel layer does."""
    torch.manual_seed(0)
    moe = MoE(ModelSpec(depth=1, dim=16, heads=1, num_experts=4, shared_ratio=1.0)).double()
    x = torch.randn(3, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    if recorder is not None:
        recorder.note("shared", moe.shared_experts)
        recorder.note("experts", moe.experts)
        moe.mixture = lambda tokens, for_shared, routing, end: dispatch.across(
            tokens, routing, moe.experts, None, lambda: moe.shared_experts(for_shared), **end._asdict()
        )
    y, stats = moe(x)
    (y.square().sum() + stats.balance_loss).backward()
    return [y.detach(), x.grad, *(p.grad for p in moe.parameters())]


def test_the_shared_expert_and_its_gradient_run_between_start_and_wait(recorder):
    found = both(recorder)
    forward = ["counts", "start", "shared", "wait", "experts", "start", "wait"]
    assert recorder.events[: len(forward)] == forward
    # Backward: the rows' gradients leave first, those of the experts' results come in time for the experts. While the
    # last ones are under way the shared expert's gradient is made, whose forward lay between start and wait.
    backward = ["start", "wait", "experts gradient", "start", "shared gradient", "wait"]
    assert recorder.events[len(forward) :] == backward
    for one, other in zip(found, both(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_an_exchange_keeps_rows_apart_that_travel_at_once(recorder):
    """Two in flight, finished in the other order: each gets its own rows and gradients."""
    one, two = (exchange.Exchange([4], [4], None) for _ in range(2))
    a, b = (torch.full((4, 2), value, requires_grad=True) for value in (1.0, 2.0))
    one.start(a)
    two.start(b)
    (two.finish() * 3).sum().backward()
    (one.finish() * 5).sum().backward()
    assert a.grad.unique().tolist() == [5.0]
    assert b.grad.unique().tolist() == [3.0]
    assert recorder.events == ["start", "start", "wait", "start", "wait", "wait", "start", "wait"]


def test_the_host_reads_the_counts_once(recorder, monkeypatch):
    """Everything else stays on the device: `tolist` is what waits for a GPU."""
    moe = MoE(ModelSpec(depth=1, dim=16, heads=1, num_experts=4))
    tokens, reads = torch.randn(15, 16), []
    routing = moe.gate(tokens)
    real = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(tuple(self.shape)) or real(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("a host synchronisation"))
    rows = dispatch.across(tokens, routing, lambda rows, counts: rows, None, meanwhile=lambda: None)
    assert reads == [(2, 1)]
    torch.testing.assert_close(rows, ops.sum_rows(
        ops.gather_rows(tokens, routing.order, routing.position), routing.order, routing.position, routing.gates
    ))  # fmt: skip
