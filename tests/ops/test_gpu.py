"""What only a GPU can show of the compiled operations: no wait of the host, CUDA graphs, streams, the same bits.

Against float64 they are held by test_native.py, on every device.
"""

from collections.abc import Callable

import pytest
import torch

from dsmoe import ops
from dsmoe.base.presets import preset
from dsmoe.ops import native
from dsmoe.scaling.tune_cases import cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in native.DEVICES, reason=f"compiled operations: {ops.kernels()}"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
SHAPES = pytest.mark.parametrize("name", ["S/2-8E2A", "XL-8E2A"])
OPS = pytest.mark.parametrize("op", ops.tunable())


def made(
    op: str, name: str, dtype: torch.dtype, tokens: int = 1024
) -> tuple[dict[str, torch.Tensor], Callable[[], None], list[torch.Tensor]]:
    """Inputs of an op at a preset's shapes, its forward and backward pass, and the list of what that gave."""
    case = cases(preset(name), tokens, torch.device("cuda"), dtype)[op]()
    given = {key: t.detach().requires_grad_() for key, t in case.inputs.items()}
    implementation, kept = ops.operation(op).named("native", "cuda"), []

    def call() -> None:
        outputs = case.outputs(implementation.function(*case.arguments(given)))
        gradients = torch.autograd.grad(outputs, list(given.values()), [torch.ones_like(t) for t in outputs])
        kept[:] = [*(t.detach() for t in outputs), *gradients]

    return given, call, kept


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def library_synchronizes(op, dtype):
    """torch._grouped_mm takes bf16 alone; in other dtypes the experts' products are a loop, which needs the counts."""
    return op == "moe_ffn" and dtype != torch.bfloat16


@OPS
@SHAPES
@DTYPES
def test_the_host_never_waits(op, name, dtype):
    if library_synchronizes(op, dtype):
        pytest.skip("the library's grouped product is bf16")
    _, call, _ = made(op, name, dtype)
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@OPS
@SHAPES
@DTYPES
def test_every_bit_is_the_same_on_every_run(op, name, dtype):
    _, call, kept = made(op, name, dtype)
    call()
    first = [t.clone() for t in kept]
    for _ in range(10):
        call()
        assert equal(first, kept)


@OPS
@SHAPES
def test_a_cuda_graph_gives_the_same_bits(op, name):
    _, call, kept = made(op, name, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    eager = [t.clone() for t in kept]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for t in kept:
        t.zero_()
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert equal(eager, kept)


@OPS
def test_work_is_put_on_the_current_stream(op):
    """The inputs arrive late on a side stream: work on any other would read the zeros before them."""
    given, call, kept = made(op, "S/2-8E2A", torch.bfloat16)
    call()
    expected = [t.clone() for t in kept]
    late = {key: t.detach().clone() for key, t in given.items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        for t in given.values():
            t.zero_()
        torch.cuda._sleep(100_000_000)
        for key, t in given.items():
            t.copy_(late[key])
        with torch.enable_grad():
            call()
    side.synchronize()
    assert equal(expected, kept)


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_traces_the_block_whole(dynamic):
    case = cases(preset("S/2-8E2A"), 512, torch.device("cuda"), torch.bfloat16)["moe_ffn"]()
    op = ops.operation("moe_ffn")
    plain = op(*case.arguments(case.inputs))
    compiled = torch.compile(lambda *given: op(*given), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert torch.equal(compiled(*case.arguments(case.inputs)), plain)


def test_an_fp16_engine_trains_with_its_loss_scaler(tmp_path):
    """The quick start's model on DeepSpeed in fp16: a run of a few steps ends well with finite losses."""
    pytest.importorskip("deepspeed")
    import json
    import os
    import subprocess
    import sys
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    config = json.loads((root / "ds_configs/quickstart.json").read_text())
    config["fp16"] = {"enabled": True}
    (tmp_path / "engine.json").write_text(json.dumps(config))
    command = [sys.executable, str(root / "launchers/pretrain.py"), "--deepspeed_config", str(tmp_path / "engine.json")]
    command += ["--run", str(tmp_path / "run"), "data.size=64", "train.images=512", "report.sample_every=0"]
    command += ["optimizer.warmup_images=64"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert losses
    assert all(loss == loss and abs(loss) < 100 for loss in losses)
