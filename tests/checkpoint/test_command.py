"""`python -m dsmoe checkpoints RUN` on a run folder with a few checkpoints."""

import pytest
import torch
from made_plan import made_plan, made_recipe

from dsmoe.__main__ import main
from dsmoe.checkpoint.manifest import Piece
from dsmoe.checkpoint.store import Store
from dsmoe.checkpoint.weights import build_model, load_weights, new_model
from dsmoe.checkpoint.writer import write_shard


@pytest.fixture
def run(tmp_path):
    """A run with three checkpoints of a real model, whose average is twice its weights; cut over two ranks."""
    root = tmp_path / "run" / "ckpt"
    root.mkdir(parents=True)
    store, plan = Store(root), made_plan(made_recipe(ema={"decay": [0.9, 0.5]}))
    weights = {name: p.detach() for name, p in new_model(plan).named_parameters()}
    for images_seen in (8, 16, 24):
        temporary = store.temporary(images_seen, "t")
        temporary.mkdir()
        for rank in range(2):
            pieces = []
            for kind, factor in (("master", 1.0), ("ema", 2.0), ("ema_0.5", 3.0)):
                for name, tensor in weights.items():
                    flat = tensor.reshape(-1) * factor
                    cut = flat.numel() // 2
                    part = flat[cut:] if rank else flat[:cut]
                    pieces.append(Piece(kind, name, tuple(tensor.shape), cut * rank, part.clone()))
            write_shard(temporary, rank, pieces)
        store.commit(temporary, images_seen, 2, {"steps": images_seen // 8, "plan": plan.to_dict()})
    return store, weights


def say(capsys, store, *arguments):
    code = main(["checkpoints", str(store.root.parent), *arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def damage(store, images_seen):
    path = store.path(images_seen) / "rank00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")


def test_list_is_newest_first_with_what_one_asks(run, capsys):
    code, out, _ = say(capsys, run[0])
    lines = out.splitlines()
    assert code == 0
    assert [line.split()[0] for line in lines] == ["images-000000024", "images-000000016", "images-000000008"]
    assert "step 3, 24 images, 2 ranks" in lines[0]
    assert "MiB" in lines[0]


def test_verify_names_the_damaged_one_and_fails(run, capsys):
    assert say(capsys, run[0], "--verify")[1].count("whole") == 3
    damage(run[0], 16)
    code, out, err = say(capsys, run[0], "--verify")
    assert code == 2
    assert "images-000000016  DAMAGED: rank00001.safetensors differs from its SHA-256" in out
    assert out.count("whole") == 2
    assert err.count("\n") == 1
    assert "1 of 3" in err


def test_prune_counts_whole_ones_only(run, capsys):
    store, _ = run
    damage(store, 24)
    assert say(capsys, store, "--prune", "3")[1] == "nothing to delete\n", "only two are whole"
    assert say(capsys, store, "--prune", "1")[1] == "deleted images-000000008\n"
    assert store.committed() == [24, 16]
    code, _, err = say(capsys, store, "--prune", "0")
    assert code == 2
    assert "at least 1" in err


@pytest.mark.parametrize(("kind", "factor"), [("ema", 2.0), ("ema_0.5", 3.0), ("model", 1.0)])
def test_export_gives_a_weight_file_of_the_newest_whole_one(run, capsys, tmp_path, kind, factor):
    store, weights = run
    damage(store, 24)
    file = tmp_path / "out.safetensors"
    code, out, _ = say(capsys, store, "--export", str(file), "--kind", kind)
    assert code == 0
    assert "at 16 images" in out
    loaded = load_weights(file)
    assert (loaded.kind, loaded.images_seen) == (kind, 16)
    assert list(loaded.plan.recipe.ema_decays) == ["ema", "ema_0.5"]
    assert loaded.state.keys() == weights.keys()
    assert all(torch.equal(loaded.state[name], weights[name] * factor) for name in weights)
    build_model(loaded)


def test_export_of_an_older_one_by_its_images(run, capsys, tmp_path):
    store, _ = run
    file = tmp_path / "out.safetensors"
    oldest = store.committed()[-1]
    assert oldest < store.committed()[0]
    code, out, _ = say(capsys, store, "--export", str(file), "--at", str(oldest))
    assert code == 0
    assert f"at {oldest} images" in out
    assert load_weights(file).images_seen == oldest


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--export", "x.safetensors", "--at", "17"], "--at is 17"),
        (["--export", "x.pt"], "ends in .safetensors"),
        (["--export", "/proc/none/x.safetensors"], "cannot write"),
        (["--export", "x.safetensors", "--kind", "ema_0.4"], "Did you mean 'ema_0.5'"),
    ],
)
def test_mistakes_are_one_line(run, capsys, arguments, said):
    code, _, err = say(capsys, run[0], *arguments)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1


def test_a_folder_that_is_no_run(tmp_path, capsys):
    assert main(["checkpoints", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
