"""The whole layer: numpy triple loop, gradients, dense equivalence, corner cases, precision, symmetries."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dsmoe.base.errors import ConfigError
from dsmoe.base.presets import ModelSpec
from dsmoe.moe import MoE


def build(kind="swiglu", experts=4, k=2, dim=8, ratio=2.0, shared=1.0, renormalize=False, scope="sample"):
    spec = ModelSpec(
        depth=1, dim=dim, heads=1, mlp_ratio=ratio, num_experts=experts, top_k=k, expert_kind=kind,
        shared_ratio=shared, renormalize=renormalize,
    )  # fmt: skip
    torch.manual_seed(experts * 10 + k)
    moe = MoE(spec, balance_scope=scope).double()
    if kind == "gelu":
        torch.nn.init.normal_(moe.experts.w3)
    return moe


def images(b, t, d=8, seed=0):
    return torch.randn(b, t, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def silu(a):
    return a / (1 + np.exp(-a))


def oracle(moe: MoE, x: np.ndarray) -> np.ndarray:
    """The layer by loops over tokens, experts and hidden vectors, from contracts 2.2."""
    p = {name: value.detach().double().numpy() for name, value in moe.named_parameters()}
    w1, w2, w3 = p["experts.w1"], p["experts.w2"], p["experts.w3"]
    out = np.zeros_like(x)
    for b, t in np.ndindex(x.shape[:2]):
        token = x[b, t]
        scores = np.exp(p["gate.weight"] @ token)
        scores /= scores.sum()
        chosen = sorted(range(len(scores)), key=lambda e: (-scores[e], e))[: moe.gate.top_k]
        total = sum(scores[e] for e in chosen) if moe.gate.renormalize else 1.0
        for e in chosen:
            if moe.experts.kind == "swiglu":
                y = w2[e] @ (silu(w1[e] @ token) * (w3[e] @ token))
            else:
                hidden = w1.shape[1]
                h = w1[e] @ token + w3[e, 0, :hidden]
                h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
                y = w2[e] @ h + w3[e, 0, hidden:]
            out[b, t] += scores[e] / total * y
        if moe.shared_experts is not None:
            gate, up, down = (p[f"shared_experts.{n}_proj.weight"] for n in ("gate", "up", "down"))
            out[b, t] += down @ (silu(gate @ token) * (up @ token))
    return out


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
@pytest.mark.parametrize(("experts", "k"), [(4, 1), (4, 2), (8, 3), (1, 1), (3, 3)])
@pytest.mark.parametrize(("shared", "renormalize"), [(1.0, False), (0.0, True)])
def test_against_a_triple_loop(kind, experts, k, shared, renormalize):
    moe = build(kind, experts, k, shared=shared, renormalize=renormalize)
    x = images(3, 7)
    y, _ = moe(x)
    assert y.shape == x.shape
    np.testing.assert_allclose(y.detach().numpy(), oracle(moe, x.numpy()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("scope", ["sample", "micro", "step"])
def test_gradients_of_output_and_losses(kind, k, scope):
    moe = build(kind, 4, k, dim=4, ratio=1.0, scope=scope)
    if scope == "step":
        moe.update_previous_load(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    x = images(2, 3, d=4)
    probs = moe.gate(x.view(-1, 4)).probs.sort(-1).values
    assert probs.diff(dim=-1).min() > 1e-5, "a choice could flip within the finite difference"
    names, values = zip(*moe.named_parameters(), strict=True)

    def outputs(x, *values):
        y, stats = torch.func.functional_call(moe, dict(zip(names, values, strict=True)), (x,))
        return y, stats.balance_loss, stats.z_loss

    inputs = tuple(v.detach().clone().requires_grad_() for v in (x, *values))
    assert all(out.requires_grad for out in outputs(*inputs))  # gradcheck passes over those that do not
    assert torch.autograd.gradcheck(outputs, inputs)


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_gradients_against_every_expert_on_every_token(kind):
    """Dense evaluation under plain autograd: masks instead of rows, none of the ops."""
    moe = build(kind, 4, 2, dim=16, shared=0.0)
    x = images(4, 20, d=16)
    target = images(4, 20, d=16, seed=1)
    ((moe(x)[0] - target) ** 2).sum().backward()
    got = {name: p.grad.clone() for name, p in moe.named_parameters()}
    moe.zero_grad()

    w1, w2, w3 = moe.experts.w1, moe.experts.w2, moe.experts.w3
    probs = (x @ moe.gate.weight.T).softmax(-1)
    mask = torch.zeros_like(probs).scatter_(-1, probs.topk(2).indices, 1.0)
    h = torch.einsum("btd,efd->btef", x, w1)
    if kind == "swiglu":
        y = torch.einsum("btef,edf->bted", F.silu(h) * torch.einsum("btd,efd->btef", x, w3), w2)
    else:
        hidden = w1.shape[1]
        y = torch.einsum("btef,edf->bted", F.gelu(h + w3[:, 0, :hidden], approximate="tanh"), w2)
        y = y + w3[:, 0, hidden:]
    (((y * (probs * mask)[..., None]).sum(2) - target) ** 2).sum().backward()
    for name, p in moe.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_one_expert_is_the_dense_mlp(kind):
    moe = build(kind, 1, 1, shared=0.0).float()
    x = images(2, 9).float()
    w1, w2, w3 = (w.detach()[0] for w in (moe.experts.w1, moe.experts.w2, moe.experts.w3))
    if kind == "swiglu":
        dense = F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)
    else:
        b1, b2 = w3[0].split((16, 8))
        dense = F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)
    y, stats = moe(x)
    torch.testing.assert_close(y, dense, rtol=1e-6, atol=1e-6)
    assert stats.balance_loss.item() == 1
    assert stats.load.tolist() == [1]


def test_ties_go_to_the_lower_experts():
    moe = build(k=2, shared=0.0)
    torch.nn.init.zeros_(moe.gate.weight)
    x = images(2, 5)
    y, stats = moe(x)
    assert stats.load.tolist() == [0.5, 0.5, 0, 0]
    np.testing.assert_allclose(y.detach().numpy(), oracle(moe, x.numpy()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_all_tokens_to_one_expert(kind):
    moe = build(kind, 4, 1)
    with torch.no_grad():
        moe.gate.weight.zero_()
        moe.gate.weight[2] = 50.0
    x = images(2, 6).abs() + 0.1
    y, stats = moe(x)
    np.testing.assert_allclose(y.detach().numpy(), oracle(moe, x.numpy()), rtol=1e-12, atol=1e-12)
    assert stats.load.tolist() == [0, 0, 1, 0]
    assert stats.balance_loss.item() == pytest.approx(4)
    y.sum().backward()
    for w in (moe.experts.w1, moe.experts.w2, moe.experts.w3):
        assert w.grad[[0, 1, 3]].abs().max() == 0
        assert w.grad[2].abs().max() > 0


@pytest.mark.parametrize("scope", ["sample", "micro", "step", "none"])
@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8)])
@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_zero_tokens(scope, shape, kind):
    moe = build(kind, scope=scope)
    y, stats = moe(torch.zeros(shape, dtype=torch.float64))
    assert y.shape == shape
    assert all(s.isfinite().all() for s in stats)
    (y.sum() + stats.balance_loss + stats.z_loss).backward()
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in moe.parameters())


def test_strided_tokens():
    moe = build()
    x = images(3, 7)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    assert torch.equal(moe(strided)[0], moe(x)[0])
    wide = torch.cat([x, x], -1)[..., :8]
    assert torch.equal(moe(wide)[0], moe(x)[0])


def plain_bf16_loop(moe: MoE, x: torch.Tensor, indices: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Every product and sum in bfloat16, one expert after the other, as peers write it."""
    tokens = x.reshape(-1, x.shape[-1])
    out = torch.zeros_like(tokens)
    w1, w2, w3 = (w.detach() for w in (moe.experts.w1, moe.experts.w2, moe.experts.w3))
    for e in range(w1.shape[0]):
        token, choice = (indices == e).nonzero(as_tuple=True)
        rows = tokens[token]
        if moe.experts.kind == "swiglu":
            y = F.linear(F.silu(F.linear(rows, w1[e])) * F.linear(rows, w3[e]), w2[e])
        else:
            b1, b2 = w3[e, 0].split((w1.shape[1], w1.shape[2]))
            y = F.linear(F.gelu(F.linear(rows, w1[e], b1), approximate="tanh"), w2[e], b2)
        out.index_add_(0, token, y * gates[token, choice, None].to(y.dtype))
    return (out + moe.shared_experts(tokens).detach()).view(x.shape)


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_bfloat16_error_is_at_most_twice_that_of_a_plain_loop(kind):
    narrow = build(kind, 8, 2, dim=64, ratio=4.0, shared=2.0).bfloat16()
    wide = build(kind, 8, 2, dim=64, ratio=4.0, shared=2.0).double()
    wide.load_state_dict({k: v.double() for k, v in narrow.state_dict().items()})
    x = images(4, 64, d=64).bfloat16()
    truth, y = wide(x.double())[0].detach(), narrow(x)[0].detach()
    assert y.dtype == torch.bfloat16
    routing = narrow.gate(x.view(-1, 64))
    assert torch.equal(routing.indices, wide.gate(x.double().view(-1, 64)).indices)
    plain = plain_bf16_loop(narrow, x, routing.indices, routing.gates.detach())
    error, allowed = (y - truth).square().mean().sqrt(), (plain - truth).square().mean().sqrt()
    assert error <= 2 * allowed
    assert (y - truth).abs().max() <= 2 * (plain - truth).abs().max()


def test_bfloat16_trains_every_parameter():
    moe = build("gelu", 4, 2, dim=16).bfloat16()
    y, stats = moe(images(4, 32, d=16).bfloat16())
    assert stats.balance_loss.dtype == stats.z_loss.dtype == stats.load.dtype == torch.float32
    (y.float().square().mean() + 0.01 * stats.balance_loss + 0.001 * stats.z_loss).backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.abs().sum() > 0 for p in moe.parameters())


def test_permuting_tokens_images_or_experts_changes_nothing_else():
    moe = build(experts=5, k=2)
    x = images(4, 6)
    y, stats = moe(x)
    token, image, expert = torch.randperm(6), torch.randperm(4), torch.randperm(5)
    torch.testing.assert_close(moe(x[:, token])[0], y[:, token], rtol=1e-13, atol=1e-13)
    y2, stats2 = moe(x[image])
    torch.testing.assert_close(y2, y[image], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(stats2.load_per_sample, stats.load_per_sample[image])
    torch.testing.assert_close(stats2.balance_loss, stats.balance_loss)
    with torch.no_grad():
        for p in (moe.gate.weight, moe.experts.w1, moe.experts.w2, moe.experts.w3):
            p.copy_(p[expert].clone())
    y3, stats3 = moe(x)
    torch.testing.assert_close(y3, y, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(stats3.load, stats.load[expert])
    torch.testing.assert_close(stats3.balance_loss, stats.balance_loss)


def test_sample_and_step_scopes_do_not_depend_on_the_micro_batch():
    x = images(6, 8)
    for scope in ("sample", "step"):
        moe = build(scope=scope)
        moe.update_previous_load(torch.tensor([0.4, 0.3, 0.2, 0.1]))
        whole = moe(x)[1].balance_loss
        parts = [moe(part)[1].balance_loss for part in x.split(2)]
        torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-13, atol=0)


def test_micro_scope_is_the_published_loss_and_depends_on_the_micro_batch():
    moe = build(scope="micro")
    x = images(6, 8)
    tokens = x.numpy().reshape(-1, 8)
    scores = np.exp(tokens @ moe.gate.weight.detach().numpy().T)
    scores /= scores.sum(-1, keepdims=True)
    published = 0.0
    for e in range(4):
        picked = sum(int(e in np.argsort(-row)[:2]) for row in scores)
        published += scores[:, e].mean() * (4 * picked / (len(tokens) * 2))
    whole = moe(x)[1].balance_loss.item()
    assert whole == pytest.approx(published, rel=1e-12)
    parts = np.mean([moe(part)[1].balance_loss.item() for part in x.split(2)])
    assert abs(parts - whole) > 1e-4


def test_statistics_count_what_happened():
    moe = build(experts=4, k=2)
    x = images(3, 10)
    _, stats = moe(x)
    routing = moe.gate(x.view(-1, 8))
    chosen = routing.indices.view(3, 20).numpy()
    expected = np.stack([np.bincount(row, minlength=4) / 20 for row in chosen])
    np.testing.assert_allclose(stats.load_per_sample, expected, rtol=1e-6)
    np.testing.assert_allclose(stats.load, expected.mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats.importance, routing.probs.detach().mean(0), rtol=1e-6)
    assert not any(s.requires_grad for s in (stats.load, stats.importance, stats.load_per_sample))


def test_scope_none_gives_zero_and_an_unknown_scope_is_refused():
    assert build(scope="none")(images(2, 4))[1].balance_loss.item() == 0
    with pytest.raises(ConfigError, match=r"unknown balance scope 'samples'.*Did you mean 'sample'"):
        build(scope="samples")


def test_recomputation_gives_the_same_gradients_and_statistics():
    moe = build()
    x = images(2, 6).requires_grad_()

    def run(call):
        moe.zero_grad()
        x.grad = None
        y, stats = call()
        (y.square().sum() + stats.balance_loss + stats.z_loss).backward()
        return [stats.load, x.grad.clone(), *(p.grad.clone() for p in moe.parameters())]

    plain, recomputed = run(lambda: moe(x)), run(lambda: checkpoint(moe, x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_repeated_runs_are_bit_identical():
    moe = build("gelu", 8, 2).float()
    x = images(4, 50).float()

    def run():
        moe.zero_grad()
        moe(x)[0].square().sum().backward()
        return [p.grad.clone() for p in moe.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize(("kind", "third"), [("swiglu", (4, 32, 8)), ("gelu", (4, 1, 40))], ids=["swiglu", "gelu"])
def test_parameters_are_exactly_the_published_ones(kind, third):
    shapes = {k: tuple(v.shape) for k, v in build(kind, ratio=4.0, shared=2.0).state_dict().items()}
    assert shapes == {
        "gate.weight": (4, 8),
        "experts.w1": (4, 32, 8),
        "experts.w2": (4, 8, 32),
        "experts.w3": third,
        "shared_experts.gate_proj.weight": (16, 8),
        "shared_experts.up_proj.weight": (16, 8),
        "shared_experts.down_proj.weight": (8, 16),
    }
    assert not [k for k in build(kind, shared=0.0).state_dict() if "shared" in k]


def test_previous_load_stays_float32_and_follows_the_update():
    moe = build(scope="step").bfloat16()
    load = torch.tensor([0.1, 0.2, 0.3, 0.4])
    moe.update_previous_load(load)
    moe = moe.double().bfloat16()
    assert torch.equal(moe.previous_load, load)
    assert build().previous_load.tolist() == [0.25] * 4


def test_step_scope_uses_the_previous_load():
    moe = build(scope="step")
    x = images(2, 6)
    probs = moe.gate(x.view(-1, 8)).probs.detach()
    assert moe(x)[1].balance_loss.item() == pytest.approx(1)
    load = torch.tensor([0.5, 0.25, 0.25, 0.0])
    moe.update_previous_load(load)
    assert moe(x)[1].balance_loss.item() == pytest.approx(4 * float((probs.mean(0) * load).sum()), rel=1e-12)


def test_built_on_the_meta_device_and_materialised():
    with torch.device("meta"):
        moe = MoE(ModelSpec(depth=1, dim=8, heads=1, num_experts=4))
    assert all(p.is_meta for p in moe.parameters())
    moe.to_empty(device="cpu").previous_load.fill_(float("nan"))
    moe.reset_parameters()
    assert moe.previous_load.tolist() == [0.25] * 4


def test_gate_gradient_flows_through_the_gates_alone():
    """Without any balance loss the router still learns (the probability multiplies the expert's output)."""
    moe = build(k=1, scope="none")
    moe(images(2, 8))[0].sum().backward()
    assert moe.gate.weight.grad.abs().max() > 0
    assert math.isfinite(moe.gate.weight.grad.sum())
