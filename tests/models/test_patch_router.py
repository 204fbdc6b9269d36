"""One patch convolution a task, chosen by the label, which also conditions the blocks (contracts 2.3.3)."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from models.small_dit import CHANNELS, CLASSES, DENSE, SIDE, build

from dsmoe.base.accounting import count_parameters
from dsmoe.base.errors import ConfigError

TASKS = dataclasses.replace(DENSE, conditions=2, tasks=3)
FIRST = CLASSES - 3
LABELS = torch.tensor([FIRST + 2, FIRST, FIRST + 1, FIRST, FIRST + 2])


def inputs():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(5, 3 * CHANNELS, SIDE, SIDE, dtype=torch.float64, generator=generator)
    return x, torch.arange(5), LABELS


def one_task(model, task):
    """The same weights as a model with that task's convolution alone."""
    plain = build(dataclasses.replace(TASKS, tasks=0), scramble=False)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("x_embedder")}
    for leaf in ("weight", "bias"):
        state[f"x_embedder.proj.{leaf}"] = model.state_dict()[f"x_embedder.proj.conv_in_{task + 1}.{leaf}"]
    plain.load_state_dict(state, strict=True)
    return plain


def test_every_image_of_a_mixed_batch_is_as_alone_in_a_model_of_its_task():
    model, (x, t, y) = build(TASKS), inputs()
    got, _ = model(x, t, y)
    assert got.shape == (5, 2 * CHANNELS, SIDE, SIDE)
    for i in range(5):
        expected, _ = one_task(model, int(y[i]) - FIRST)(x[i : i + 1], t[i : i + 1], y[i : i + 1])
        torch.testing.assert_close(got[i : i + 1], expected, rtol=0, atol=1e-12)


def test_tokens_are_those_of_the_labels_convolution():
    model, (x, _, y) = build(TASKS), inputs()
    got = model.x_embedder(x, y)
    for i, label in enumerate(y.tolist()):
        conv = model.x_embedder.proj[f"conv_in_{label - FIRST + 1}"]
        expected = F.conv2d(x[i : i + 1], conv.weight, conv.bias, stride=2).flatten(2).transpose(1, 2)
        torch.testing.assert_close(got[i : i + 1], expected, rtol=0, atol=1e-12)


def test_gradients_are_the_sum_over_the_tasks_own_images_and_zero_for_an_absent_task():
    model, (x, t, _) = build(TASKS), inputs()
    y = torch.tensor([FIRST, FIRST + 1, FIRST, FIRST, FIRST + 1])
    model(x, t, y)[0].square().sum().backward()
    for task in range(2):
        alone = one_task(model, task)
        mine = y == FIRST + task
        alone(x[mine], t[mine], y[mine])[0].square().sum().backward()
        got = model.x_embedder.proj[f"conv_in_{task + 1}"].weight.grad
        expected = alone.x_embedder.proj.weight.grad
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12 * expected.abs().max().item())
    absent = model.x_embedder.proj["conv_in_3"]
    assert absent.weight.grad.count_nonzero() == 0
    assert absent.bias.grad.count_nonzero() == 0


def test_the_label_conditions_the_blocks_too():
    """Two tasks with equal convolutions still differ by their label's row."""
    model, (x, t, _) = build(TASKS), inputs()
    model.x_embedder.proj["conv_in_2"].load_state_dict(model.x_embedder.proj["conv_in_1"].state_dict())
    first, second = (model(x, t, torch.full((5,), FIRST + k))[0] for k in (0, 1))
    assert (first - second).abs().max() > 1e-3
    table = model.y_embedder.embedding_table.weight
    with torch.no_grad():
        table[FIRST + 1] = table[FIRST]
    torch.testing.assert_close(model(x, t, torch.full((5,), FIRST + 1))[0], first, rtol=0, atol=0)


@pytest.mark.parametrize("label", [0, FIRST - 1, CLASSES])
def test_an_image_without_a_task_is_loudly_not_a_number(label):
    model, (x, t, y) = build(TASKS), inputs()
    y = y.clone()
    y[1] = label
    got, _ = model(x, t, y)
    assert got[1].isnan().all()
    assert got[[0, 2, 3, 4]].isfinite().all()


def test_keys_and_parameters_are_the_published_ones():
    model = build(TASKS)
    embedder = {k: tuple(v.shape) for k, v in model.state_dict().items() if k.startswith("x_embedder")}
    expected = {}
    for task in (1, 2, 3):
        expected |= {f"x_embedder.proj.conv_in_{task}.weight": (24, 3 * CHANNELS, 2, 2)}
        expected |= {f"x_embedder.proj.conv_in_{task}.bias": (24,)}
    assert embedder == expected
    count = count_parameters(TASKS, channels=CHANNELS, num_classes=CLASSES, input_size=SIDE, learn_sigma=True)
    assert count.trained == sum(p.numel() for p in model.parameters())


def test_a_fresh_router_is_drawn_like_a_patch_convolution():
    model = build(TASKS, scramble=False)
    for conv in model.x_embedder.proj.values():
        bound = (6 / (3 * CHANNELS * 4 + 24)) ** 0.5
        assert bound * 0.9 < conv.weight.abs().max() <= bound
        assert conv.bias.count_nonzero() == 0


def test_more_tasks_than_labels_are_refused():
    with pytest.raises(ConfigError, match=r"model\.tasks is 3 but there are 2 labels"):
        build(TASKS, num_classes=2)
