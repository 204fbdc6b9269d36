"""Every key and shape of the released checkpoints, at full size on the meta device, there and back."""

from functools import partial

import pytest
import torch
from convert.published import RELEASED, shapes

from dsmoe.base.accounting import count_parameters
from dsmoe.base.presets import PRESETS
from dsmoe.convert.diffusers import diffusers_shapes, write_diffusers
from dsmoe.convert.keys import read_published, write_published
from dsmoe.convert.recognise import Given, recognise
from dsmoe.models.dit import DiT

# Millions of parameters in the papers' tables (contracts 2.1.9, 2.2, 2.3.1).
STATED = {"XL/2": 675.1, "S/2-8E2A": 199, "G/2-16E2A": 16500, "XL-8E2A-generalist": 2760}
LAYOUTS = {"XL/2": "timm", "S/2-8E2A": "timm", "G/2-16E2A": "flash", "XL-8E2A-generalist": "timm"}
released = pytest.mark.parametrize("name", RELEASED)


def on_meta(name):
    return {key: torch.empty(shape, device="meta") for key, shape in shapes(RELEASED[name]).items()}


def shaped(tensors):
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


@released
def test_a_released_checkpoint_is_recognised_from_its_shapes_alone(name):
    kind, found = RELEASED[name], recognise(on_meta(name), Given())
    assert (found.preset, found.layout, found.spec) == (name, LAYOUTS[name], PRESETS[name])
    assert (found.channels, found.learn_sigma, found.input_size) == (4, True, kind.side)
    assert (found.num_classes, found.null_class) == (kind.rows - 1, True)
    count = count_parameters(found.spec, channels=4, num_classes=kind.rows - 1, input_size=kind.side, learn_sigma=True)
    assert count.total == sum(tensor.numel() for tensor in on_meta(name).values())
    assert count.total / 1e6 == pytest.approx(STATED[name], rel=5e-3)


@released
def test_every_released_tensor_finds_its_place_in_our_model_and_back(name):
    kind, spec, state = RELEASED[name], PRESETS[name], on_meta(name)
    ours = {key: make() for key, make in read_published(state, spec, attention=LAYOUTS[name]).items()}
    with torch.device("meta"):
        model = DiT(spec, input_size=kind.side, in_channels=4, num_classes=kind.rows - 1, learn_sigma=True)
    assert shaped(ours) == shaped(model.state_dict())
    write = partial(write_published, input_size=kind.side, attention=LAYOUTS[name])
    back = {key: make() for key, make in write(ours, spec).items()}
    assert shaped(back) == shapes(kind)


def test_diffusers_keys_of_the_released_xl():
    spec = PRESETS["XL/2"]
    ours = {key: make() for key, make in read_published(on_meta("XL/2"), spec).items()}
    theirs = {key: make() for key, make in write_diffusers(ours, spec).items()}
    assert all(
        all(want in (None, got) for want, got in zip(shape, theirs[key].shape, strict=True))
        for key, shape in diffusers_shapes(spec).items()
    )
    extra = sum(t.numel() for t in theirs.values()) - sum(t.numel() for t in ours.values())
    assert extra == 27 * (1152 * 256 + 1152 + 1152 * 1152 + 1152 + 1001 * 1152)
    assert extra / 1e6 == pytest.approx(77 * 27 / 28, abs=1)  # contracts 2.1.9 count all 28 copies
    found = recognise(theirs, Given(), {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28,
                                        "patch_size": 2, "sample_size": 32})  # fmt: skip
    assert (found.preset, found.layout, found.input_size) == ("XL/2", "diffusers", 32)
