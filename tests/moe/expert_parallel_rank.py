"""Run by every rank of test_expert_parallel: the layer across ranks against all experts on one rank, in float64.

The oracle is `MoE` over the tokens of all ranks together, itself held by tests against numpy (test_block).
"""

import json
import os

import torch
from torch.utils.checkpoint import checkpoint

from dsmoe.base.presets import ModelSpec
from dsmoe.moe import MoE
from dsmoe.runtime import distributed
from dsmoe.runtime.device import Device
from dsmoe.training.deepspeed_patches import skip_shm_op

DIM, EXPERTS = 16, 8
KINDS = {
    "swiglu": ModelSpec(depth=1, dim=DIM, heads=1, num_experts=EXPERTS, shared_ratio=2.0),
    "gelu": ModelSpec(depth=1, dim=DIM, heads=1, num_experts=EXPERTS, expert_kind="gelu", renormalize=True),
    "top-1": ModelSpec(depth=1, dim=DIM, heads=1, num_experts=EXPERTS, top_k=1, shared_ratio=2.0),
}
# name: (images of each rank, tokens of an image, experts that the router is drawn to)
CASES = {
    "even": ((2, 2, 2, 2), 6, ()),
    "unequal, one rank without tokens": ((3, 0, 1, 5), 4, ()),
    "one-token sequences": ((1, 2, 1, 4), 1, ()),
    "all tokens to one expert, or one pair": ((2, 1, 3, 2), 5, (2, 3)),
    "some experts without tokens anywhere": ((2, 2, 2, 2), 5, (0, 3, 5)),
    "one token in all": ((0, 0, 1, 0), 1, ()),
    "no token in all": ((0, 0, 0, 0), 4, ()),
}


def draw_to(layer, experts):
    """Make a token with a positive first feature choose among the first k of these experts, or all if they are more."""
    k = layer.gate.top_k
    with torch.no_grad():
        for expert in experts[:k] if len(experts) == 2 else experts:
            layer.gate.weight[expert, 0] += 50


def inputs(images, tokens):
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.randn(count, tokens, DIM, dtype=torch.float64, generator=generator) for count in images]
    for x in drawn:
        x[..., 0] = x[..., 0].abs() + 1
    return drawn


def outcome(layer, x, weight, recompute):
    """Output, and gradients of the input and of every parameter, of a loss that also asks the router's losses.

    recompute: nothing, the whole layer (True), or the inside of the "experts".
    """
    x = x.clone().requires_grad_()
    layer.experts.recompute = recompute == "experts"
    y, stats = checkpoint(layer, x, use_reentrant=False) if recompute is True else layer(x)
    loss = (y * weight).sum() + len(x) * (stats.balance_loss + 0.1 * stats.z_loss)
    loss.backward()
    return y.detach(), x.grad, {name: p.grad for name, p in layer.named_parameters()}


def case(spec, images, tokens, drawn, groups, recompute):
    """Largest difference from the oracle over output, input gradient and parameter gradients; what of interest was met.

    The latter: experts without tokens here but not everywhere, experts without any, whether this rank has no tokens,
    whether its experts have none.
    """
    from dsmoe.moe.deepspeed_layer import ExpertParallelMoE

    torch.manual_seed(0)
    truth = MoE(spec).double()
    torch.manual_seed(0)
    layer = ExpertParallelMoE(spec, balance_scope="sample", expert_groups=groups).double()
    for one in (truth, layer):
        draw_to(one, drawn)
    parts, rank = inputs(images, tokens), distributed.rank()
    whole = torch.cat(parts)
    weight = torch.randn(whole.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    start = sum(images[:rank])
    mine = slice(start, start + images[rank])
    y, dx, gradients = outcome(layer, parts[rank], weight[mine], recompute)
    true_y, true_dx, true_gradients = outcome(truth, whole, weight, False)
    differences = [y - true_y[mine], dx - true_dx[mine]]
    for name, gradient in gradients.items():
        found, expected = gradient.clone(), true_gradients[name]
        if name.startswith("experts."):
            held = layer.experts.held
            expected = expected[held.start : held.stop]
            found = distributed.all_reduce_(found, "sum", groups.data)  # ranks with the same experts
        else:
            found = distributed.all_reduce_(found, "sum")
        differences.append(found - expected)
    worst = max((d.abs().max().item() for d in differences if d.numel()), default=0.0)
    return worst, met(layer, parts[rank], whole)


def met(layer, mine, whole):
    """See `case`."""
    here, everywhere = (layer.gate(x.reshape(-1, DIM)).counts for x in (mine, whole))
    held = layer.experts.held
    return {
        "idle here": int(((here == 0) & (everywhere > 0)).sum()),
        "idle everywhere": int((everywhere == 0).sum()),
        "no tokens": not mine.numel(),
        "nothing arrives": not everywhere[held.start : held.stop].sum().item(),
    }


def main():
    distributed.initialize(distributed.discover(os.environ), Device("cpu"))
    skip_shm_op()
    from dsmoe.moe.deepspeed_layer import create_groups

    for size in (2, 4):
        groups = create_groups(size)
        for kind, spec in KINDS.items():
            for number, (name, (images, tokens, drawn)) in enumerate(CASES.items()):
                # Every case under one size with the whole layer computed again, under the other the experts' inside.
                for recompute in (False, (True, "experts")[(number + size // 2) % 2]):
                    worst, seen = case(spec, images, tokens, drawn, groups, recompute)
                    print("CASE", json.dumps([size, kind, name, recompute, seen, worst]), flush=True)
    distributed.shutdown()


if __name__ == "__main__":
    main()
