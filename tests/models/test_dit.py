"""The model against plain numpy, against itself with one expert, and its start, statistics and precisions."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from models.small_dit import CHANNELS, DENSE, GELU_MOE, MOE, QK_NORM_MOE, SIDE, batch, build
from scipy import stats as st

from dsmoe.base.errors import ConfigError
from dsmoe.base.presets import preset

# ----------------------------------------------------------------------------------------------------------
# A dense DiT in plain numpy, from contracts 2.1.


def np_norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def np_linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def np_silu(x):
    return x / (1 + np.exp(-x))


def np_gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def np_attention(p, name, x, heads):
    count, dim = x.shape
    q, k, v = np_linear(p, f"{name}.qkv", x).reshape(count, 3, heads, dim // heads).transpose(1, 2, 0, 3)
    scores = q @ k.transpose(0, 2, 1) / math.sqrt(dim // heads)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    return np_linear(p, f"{name}.proj", (weights @ v).transpose(1, 0, 2).reshape(count, dim))


def np_block(p, name, x, c, heads):
    """x [T, D], c [D]: one image."""
    shift1, scale1, gate1, shift2, scale2, gate2 = np.split(np_linear(p, f"{name}.adaLN_modulation.1", np_silu(c)), 6)
    x = x + gate1 * np_attention(p, f"{name}.attn", np_norm(x) * (1 + scale1) + shift1, heads)
    h = np_gelu(np_linear(p, f"{name}.mlp.fc1", np_norm(x) * (1 + scale2) + shift2))
    return x + gate2 * np_linear(p, f"{name}.mlp.fc2", h)


def np_condition(p, t, y):
    # Frequencies are constants kept in fp32 (design decision 8).
    frequencies = np.exp(-math.log(10000) * np.arange(128) / 128).astype(np.float32).astype(np.float64)
    features = np.concatenate([np.cos(t * frequencies), np.sin(t * frequencies)])
    hidden = np_silu(np_linear(p, "t_embedder.mlp.0", features))
    return np_linear(p, "t_embedder.mlp.2", hidden) + p["y_embedder.embedding_table.weight"][y]


def np_dit(p, spec, position, x, t, y):
    """x [C, S, S] to [2C, S, S]: one image."""
    channels, side, _ = x.shape
    grid, patch = side // spec.patch, spec.patch
    patches = x.reshape(channels, grid, patch, grid, patch).transpose(1, 3, 0, 2, 4).reshape(grid**2, -1)
    weight = p["x_embedder.proj.weight"].reshape(spec.dim, -1)
    tokens = patches @ weight.T + p["x_embedder.proj.bias"] + position
    c = np_condition(p, t, y)
    for i in range(spec.depth):
        tokens = np_block(p, f"blocks.{i}", tokens, c, spec.heads)
    shift, scale = np.split(np_linear(p, "final_layer.adaLN_modulation.1", np_silu(c)), 2)
    out = np_linear(p, "final_layer.linear", np_norm(tokens) * (1 + scale) + shift)
    return out.reshape(grid, grid, patch, patch, -1).transpose(4, 0, 2, 1, 3).reshape(-1, side, side)


def as_numpy(model):
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def test_block_equals_plain_numpy():
    model = build(DENSE)
    x, c = torch.randn(3, 9, 24, dtype=torch.float64), torch.randn(3, 24, dtype=torch.float64)
    got, stats = model.blocks[1](x, c)
    assert stats is None
    for b in range(3):
        expected = np_block(as_numpy(model), "blocks.1", x[b].numpy(), c[b].numpy(), 3)
        np.testing.assert_allclose(got[b].detach().numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("patch", [1, 2, 3])
def test_dense_model_equals_plain_numpy(patch):
    spec = dataclasses.replace(DENSE, patch=patch)
    model = build(spec)
    x, t, y = batch()
    got, stats = model(x, t, y)
    assert stats is None
    position = model.pos_embed[0].double().numpy()
    for b in range(3):
        expected = np_dit(as_numpy(model), spec, position, x[b].numpy(), t[b].item(), y[b].item())
        tolerance = 1e-12 * np.abs(expected).max()
        np.testing.assert_allclose(got[b].detach().numpy(), expected, rtol=0, atol=tolerance)


def test_keys_and_shapes_are_the_published_ones():
    sizes = {"input_size": 32, "in_channels": 4, "num_classes": 1000}
    model = build(preset("S/2"), dtype=torch.float32, scramble=False, **sizes)
    block = {
        "attn.qkv.weight": (1152, 384),
        "attn.qkv.bias": (1152,),
        "attn.proj.weight": (384, 384),
        "attn.proj.bias": (384,),
        "mlp.fc1.weight": (1536, 384),
        "mlp.fc1.bias": (1536,),
        "mlp.fc2.weight": (384, 1536),
        "mlp.fc2.bias": (384,),
        "adaLN_modulation.1.weight": (2304, 384),
        "adaLN_modulation.1.bias": (2304,),
    }
    expected = {
        "x_embedder.proj.weight": (384, 4, 2, 2),
        "x_embedder.proj.bias": (384,),
        "t_embedder.mlp.0.weight": (384, 256),
        "t_embedder.mlp.0.bias": (384,),
        "t_embedder.mlp.2.weight": (384, 384),
        "t_embedder.mlp.2.bias": (384,),
        "y_embedder.embedding_table.weight": (1001, 384),
        "final_layer.linear.weight": (32, 384),
        "final_layer.linear.bias": (32,),
        "final_layer.adaLN_modulation.1.weight": (768, 384),
        "final_layer.adaLN_modulation.1.bias": (768,),
    } | {f"blocks.{i}.{key}": shape for i in range(12) for key, shape in block.items()}
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected
    assert model.pos_embed.shape == (1, 256, 384)


# ----------------------------------------------------------------------------------------------------------
# The start.


@pytest.mark.parametrize("spec", [DENSE, MOE, GELU_MOE, QK_NORM_MOE], ids=["dense", "swiglu", "gelu", "qk_norm"])
def test_fresh_model_gives_zero_and_its_blocks_are_the_identity(spec):
    model = build(spec, dtype=torch.float32, scramble=False)
    x, t, y = batch(dtype=torch.float32)
    assert torch.equal(model(x, t, y)[0], torch.zeros(3, 2 * CHANNELS, SIDE, SIDE))
    tokens, c = torch.randn(3, 9, 24), torch.randn(3, 24)
    for block in model.blocks:
        assert torch.equal(block(tokens, c)[0], tokens)


def expected_start(name, shape):
    """("zero",), ("one",), ("uniform", bound) or ("normal", std) by name; None for a name nobody foresaw."""
    leaf = name.split(".", 2)[2] if name.startswith("blocks.") else name
    if leaf in ("attn.q_norm.weight", "attn.k_norm.weight"):
        return ("one",)
    xavier = math.sqrt(6 / (math.prod(shape[1:]) + shape[0]))
    if leaf.endswith("adaLN_modulation.1.weight") or leaf == "final_layer.linear.weight":
        return ("zero",)
    if leaf.endswith(".bias"):
        return ("zero",)
    if leaf in ("t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight", "y_embedder.embedding_table.weight"):
        return ("normal", 0.02)
    if leaf in ("x_embedder.proj.weight", "attn.qkv.weight", "attn.proj.weight"):
        return ("uniform", xavier)
    if leaf in ("mlp.fc1.weight", "mlp.fc2.weight"):
        return ("uniform", xavier)
    if leaf == "moe.gate.weight":
        # kaiming_uniform(a=sqrt 5): sqrt(6 / ((1 + 5) * fan_in)).
        return ("uniform", 1 / math.sqrt(shape[1]))
    if leaf.startswith("moe.shared_experts."):
        return ("uniform", xavier)
    if leaf == "moe.experts.w3" and shape[1] == 1:
        return ("zero",)
    if leaf in ("moe.experts.w1", "moe.experts.w2", "moe.experts.w3"):
        return ("uniform", math.sqrt(6 / (shape[1] + shape[2])))
    return None


def check_start(name, value):
    rule = expected_start(name, tuple(value.shape))
    assert rule is not None, f"no initialisation is specified for {name}"
    if rule[0] in ("zero", "one"):
        assert (value == (rule[0] == "one")).all(), name
        return
    values = value.detach().flatten().double().numpy()
    law = st.uniform(-rule[1], 2 * rule[1]) if rule[0] == "uniform" else st.norm(0, rule[1])
    if rule[0] == "uniform":
        assert np.abs(values).max() <= rule[1] * (1 + 1e-6), name
    # A wrong bound or deviation by 10 % shifts the distribution by 0.025 or more; 1e4 values resolve 0.02.
    assert st.kstest(values[:200_000], law.cdf).pvalue > 1e-5, name


@pytest.mark.parametrize(
    "spec",
    [
        preset("nano", depth=2),
        preset("nano-4E2A", depth=2),
        preset("nano-4E2A", depth=2, expert_kind="gelu", shared_ratio=0.0),
        preset("nano", depth=2, qk_norm=True),
    ],
    ids=["dense", "swiglu", "gelu", "qk_norm"],
)
def test_every_parameter_starts_as_specified(spec):
    model = build(spec, dtype=torch.float32, scramble=False, in_channels=4, num_classes=1000)
    for name, value in model.named_parameters():
        check_start(name, value)
        if ".moe.experts." in name:
            for expert in value:
                check_start(name, expert[None])


@pytest.mark.parametrize("spec", [DENSE, MOE, GELU_MOE, QK_NORM_MOE], ids=["dense", "swiglu", "gelu", "qk_norm"])
def test_start_is_a_function_of_the_seed_also_by_way_of_the_meta_device(spec):
    first, second = (build(spec, dtype=torch.float32, seed=5, scramble=False) for _ in range(2))
    other = build(spec, dtype=torch.float32, seed=6, scramble=False)
    with torch.device("meta"):
        late = build(spec, dtype=torch.float32, scramble=False)
    assert all(p.is_meta for p in late.parameters())
    late.to_empty(device="cpu")
    torch.manual_seed(5)
    late.initialize()
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
        assert torch.equal(value, late.state_dict()[name]), name
    assert not torch.equal(first.x_embedder.proj.weight, other.x_embedder.proj.weight)
    assert torch.equal(first.pos_embed, late.pos_embed)
    assert torch.equal(first.t_embedder.frequencies, late.t_embedder.frequencies)


def test_latent_side_must_be_a_multiple_of_the_patch():
    with pytest.raises(ConfigError, match=r"latent side 7 .* model\.patch 2"):
        build(DENSE, input_size=7)


# ----------------------------------------------------------------------------------------------------------
# Experts.


def one_expert_pair():
    """A dense model and a MoE model with one GELU expert of the same weights, renormalised top-1."""
    dense = build(DENSE)
    spec = dataclasses.replace(DENSE, num_experts=1, top_k=1, expert_kind="gelu", renormalize=True)
    moe = build(spec, seed=9)
    state = dense.state_dict()
    for i in range(spec.depth):
        mlp, experts = f"blocks.{i}.mlp", f"blocks.{i}.moe.experts"
        state[f"{experts}.w1"] = state.pop(f"{mlp}.fc1.weight")[None]
        state[f"{experts}.w2"] = state.pop(f"{mlp}.fc2.weight")[None]
        biases = [state.pop(f"{mlp}.fc1.bias"), state.pop(f"{mlp}.fc2.bias")]
        state[f"{experts}.w3"] = torch.cat(biases)[None, None]
        state[f"blocks.{i}.moe.gate.weight"] = moe.blocks[i].moe.gate.weight.detach()
    moe.load_state_dict(state, strict=True)
    return dense, moe


def test_one_expert_model_equals_the_dense_one_in_outputs_and_gradients():
    dense, moe = one_expert_pair()
    x, t, y = batch()
    target = torch.randn(3, 2 * CHANNELS, SIDE, SIDE, dtype=torch.float64)
    outputs = []
    for model in (dense, moe):
        out, _ = model(x, t, y)
        (out * target).sum().backward()
        outputs.append(out.detach())
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-10, atol=1e-10)
    ours = {name: p.grad for name, p in moe.named_parameters()}
    for name, p in dense.named_parameters():
        if not name.startswith("blocks.") or ".mlp." not in name:
            got = ours.pop(name)
        else:
            experts, leaf = name.split(".mlp.")[0] + ".moe.experts", name.split(".mlp.")[1]
            biases = ours[f"{experts}.w3"][0, 0]
            got = {
                "fc1.weight": ours[f"{experts}.w1"][0],
                "fc2.weight": ours[f"{experts}.w2"][0],
                "fc1.bias": biases[: DENSE.mlp_hidden],
                "fc2.bias": biases[DENSE.mlp_hidden :],
            }[leaf]
        torch.testing.assert_close(got, p.grad, rtol=1e-10, atol=1e-10 * p.grad.abs().max().item(), msg=name)
    for name, grad in ours.items():
        assert ".moe." in name
        if name.endswith("gate.weight"):
            assert grad is None or grad.abs().max() < 1e-12, name


@pytest.mark.parametrize("spec", [MOE, GELU_MOE], ids=["swiglu", "gelu"])
def test_statistics_are_those_of_the_layers(spec):
    model = build(spec)
    seen = []
    for block in model.blocks:
        block.moe.register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
    _, stats = model(*batch())
    assert stats.load.shape == stats.importance.shape == (2, 4)
    assert stats.load_per_sample.shape == (3, 2, 4)
    assert stats.balance_loss.shape == stats.z_loss.shape == ()
    for i, layer in enumerate(seen):
        assert torch.equal(stats.load[i], layer.load)
        assert torch.equal(stats.importance[i], layer.importance)
        assert torch.equal(stats.load_per_sample[:, i], layer.load_per_sample)
    assert stats.balance_loss.item() == pytest.approx(sum(s.balance_loss.item() for s in seen), rel=1e-6)
    assert stats.z_loss.item() == pytest.approx(sum(s.z_loss.item() for s in seen), rel=1e-6)
    torch.testing.assert_close(stats.load.sum(1), torch.ones(2))
    torch.testing.assert_close(stats.load_per_sample.mean(0), stats.load)


@pytest.mark.parametrize(
    ("spec", "what", "blocks_again"),
    [(DENSE, True, 2), (MOE, True, 2), (MOE, "experts", 0)],
    ids=["dense", "moe", "experts"],
)
def test_activation_checkpointing_changes_nothing_but_recomputes(spec, what, blocks_again):
    x, t, y = batch()
    results = []
    for recompute in (False, what):
        model = build(spec)
        model.activation_checkpointing = recompute
        calls = []
        for block in model.blocks:
            block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        out, stats = model(x, t, y)
        loss = out.square().mean()
        if stats is not None:
            loss = loss + 0.1 * stats.balance_loss + 0.01 * stats.z_loss
        loss.backward()
        results.append((out, stats, {n: p.grad for n, p in model.named_parameters()}, len(calls)))
    (out, stats, grads, calls), (out_c, stats_c, grads_c, calls_c) = results
    assert (calls, calls_c) == (2, 2 + blocks_again)
    assert torch.equal(out, out_c)
    if stats is not None:
        assert all(torch.equal(a, b) for a, b in zip(stats, stats_c, strict=True))
    for name, grad in grads.items():
        assert torch.equal(grad, grads_c[name]), name


def test_a_block_is_recomputed_before_the_backward_pass_enters_its_experts():
    """ZeRO-3 gathers weights when the backward pass comes to a module, and drops them after every forward."""
    model = build(MOE)
    model.activation_checkpointing = True
    forwards, entered = [], {}
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, number=number: forwards.append(number))
        block.moe.experts.register_full_backward_pre_hook(
            lambda *_, number=number: entered.update({number: forwards.count(number)})
        )
    out, _ = model(*batch())
    out.square().mean().backward()
    assert entered == {0: 2, 1: 2}


def test_what_is_recomputed_can_be_changed_back():
    model = build(MOE)
    for what, lean in (("experts", True), (True, False), ("experts", True), (False, False)):
        model.activation_checkpointing = what
        assert model.activation_checkpointing == what
        assert [block.moe.experts.recompute for block in model.blocks] == [lean] * 2
    with pytest.raises(AssertionError, match="no experts"):
        build(DENSE).activation_checkpointing = "experts"


@pytest.mark.parametrize("spec", [DENSE, MOE, QK_NORM_MOE], ids=["dense", "moe", "qk_norm"])
def test_each_module_uses_only_its_own_parameters(spec):
    """ZeRO-3 gathers a module's parameters around its own forward: outside it they are empty here too."""
    model = build(spec)
    arguments = batch()
    with torch.no_grad():
        expected, _ = model(*arguments)
        for module in model.modules():
            # A MoE block is gathered as a whole (a ZeRO-3 leaf), since which expert runs depends on the data.
            owned = list(module.parameters(recurse=type(module).__name__ == "MoE"))
            owned = [] if not owned else [(p, p.data) for p in owned]

            def gather(module, inputs, owned=owned):
                for parameter, full in owned:
                    parameter.data = full

            def release(module, inputs, output, owned=owned):
                for parameter, full in owned:
                    parameter.data = full.new_empty(0)

            if owned and not any(p.data.numel() == 0 for p, _ in owned):
                module.register_forward_pre_hook(gather)
                module.register_forward_hook(release)
        for parameter in model.parameters():
            parameter.data = parameter.data.new_empty(0)
        got, _ = model(*arguments)
    assert torch.equal(got, expected)
