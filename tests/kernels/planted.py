"""Mistakes to plant into copies of the kernels, and a runner that says how each is caught.

As a program: `planted.py LIBRARY:CHECK...` runs each check in a process of its own (a caught mistake may end it) and
prints one JSON object: for each argument None, or how the check failed.
"""

import importlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent


class Mistake(NamedTuple):
    """In `file` of csrc/cuda, `old` (which must be there exactly once) becomes `new`; `check` must then fail."""

    name: str
    family: str
    file: str
    old: str
    new: str
    check: str


# Fewer template instances, so that a copy compiles in two seconds: float32 alone.
SLIM = {
    "launch.cuh": [
        ("case DSMOE_BFLOAT16: return f(Type<bf16>{});", ""),
        ("case DSMOE_FLOAT16: return f(Type<f16>{});", ""),
    ],
    "route.cu": [
        ("if (experts <= 2) return f(Number<2>{});", ""),
        ("if (experts <= 4) return f(Number<4>{});", ""),
        ("if (experts <= 16) return f(Number<16>{});", ""),
        ("if (experts <= 32) return f(Number<32>{});", ""),
    ],
}

# Test and its arguments, all float32; every family's checks pass without a mistake.
CHECKS = {
    "route8": ("test_route", "test_forward", (257, 256, 8, 2, "F32", True, False)),
    "route_few": ("test_route", "test_forward", (70, 40, 5, 2, "F32", False, False)),
    "route64": ("test_route", "test_forward", (193, 320, 64, 2, "F32", True, False)),
    "route64_ties": ("test_route", "test_equal_scores_go_to_the_lower_expert", (64, 4)),
    "route_many_blocks": ("test_route", "test_forward", (17000, 8, 5, 1, "F32", False, False)),
    "route_backward": ("test_route", "test_backward", (257, 256, 8, 2, "F32", True, ("probs", "gates"))),
    "gather": ("test_rows", "test_gather", (50, 1152, 2, 1, "F32")),
    "sum_rows": ("test_rows", "test_sum", (50, 1152, 2, 1, "F32", ("gates", "add"))),
    "sum_backward": ("test_rows", "test_sum_backward", (50, 1152, 2, 1, "F32", ("drows", "dgates"), ("gates",))),
    "gelu": ("test_activation", "test_forward_and_backward", ([3, 70], 5, 1536, "F32", "gelu", ("bias", "gate"))),
    "glu": ("test_grouped_glu", "test_against_float64", ([66, 0, 20], 0, 384, 8, True)),
    "glu_gather": ("test_grouped_glu", "test_gathered", (50, 2, 3, 3, 328, 8, 0, True)),
    "glu_exact": ("test_grouped_glu", "test_gathered", (20, 1, 2, 0, 8, 8, 0, False)),
    "glu_shared": ("test_grouped_glu", "test_gathered", (130, 1, 2, 0, 72, 8, 136, False)),
    "glu_diverged": ("test_grouped_glu", "test_what_has_diverged_stays_where_it_is", ()),
    "dglu": ("test_grouped_dglu", "test_against_float64", ([66, 0, 20], 0, 72, 264, True)),
    "modulate": ("test_modulate", "test_forward_and_backward", (3, 33, 264, "F32")),
}

SYNC, WARP = "__syncthreads();", "__syncwarp();"
FENCE = "if (gathers) fence_copies_before_wgmma();"
RELEASED = "mbarrier_wait(ring.released(step), Ring::parity(step)"
DGLU_LAUNCH = """\
  DSMOE_LAUNCH(grouped_dglu, dim3(tiles), dim3(kRingThreads), kRingBytes, stream, routed, shared, list, from,
               static_cast<int>(D), part, shared_part);"""
DGLU_GATES = """\
  if (dgate) {
    DSMOE_LAUNCH(add_gate_partials, dim3(static_cast<unsigned>(ceil_div(rows, kGateThreads))), dim3(kGateThreads), 0,
                 stream, partial, ends, E, rows, static_cast<int>(ceil_div(F, kDgluColumns)), dgate);
  }"""
MISTAKES = [
    Mistake("no barrier after the weights are loaded", "route", "route_product.cuh",
            f"turns, weights);\n  {SYNC}", "turns, weights);", "route8"),
    Mistake("no barrier between slices", "route", "route_product.cuh",
            f"total[t][e] += sum[t][e];\n    {SYNC}", "total[t][e] += sum[t][e];", "route64"),
    Mistake("a slice row too many", "route", "route_product.cuh",
            "shared[group * 8 + i][row ^ (group * 8)]", "shared[group * 8 + i + 1][row ^ (group * 8)]", "route64"),
    Mistake("shuffles over half a segment", "route", "route_choose.cuh",
            "for (int d = lanes / 2; d > 0; d >>= 1) v +=", "for (int d = lanes / 4; d > 0; d >>= 1) v +=", "route8"),
    Mistake("one token too many", "route", "route_choose.cuh",
            "&& token < shape.tokens;", "&& token <= shape.tokens;", "route8"),
    Mistake("ties to the higher expert", "route", "route_choose.cuh",
            "if (found < 0 && mine)", "if (mine)", "route64_ties"),
    Mistake("warps added without a barrier", "route", "route_choose.cuh",
            f"  {SYNC}\n  const int e = threadIdx.x;", "  const int e = threadIdx.x;", "route8"),
    Mistake("idle lanes leave out the shuffles", "route", "route_choose.cuh",
            "const float logsumexp = softmax", "if (!active) continue;\n    const float logsumexp = softmax", "route8"),
    Mistake("a scan round starts while the last is read", "route", "route_map.cuh",
            f"before += all_warps;\n    {SYNC}", "before += all_warps;", "route_many_blocks"),
    Mistake("ranks move on before they are read", "route", "route_map.cuh",
            f"{WARP}\n    if (e >= 0 && rank == 0)", "if (e >= 0 && rank == 0)", "route8"),
    Mistake("lanes leave before a shuffle", "route", "route_backward.cuh",
            "product = S::sum(product);", "if (!active) return;\n  product = S::sum(product);", "route_backward"),
    Mistake("one row too many", "rows", "rows.cuh", "if (r >= rows) return;", "if (r > rows) return;", "gather"),
    Mistake("gate gradients read without a barrier", "rows", "rows.cuh",
            f"if (!g.dgates) return;\n  {SYNC}", "if (!g.dgates) return;", "sum_backward"),
    Mistake("the last columns of a row left out", "rows", "rows.cuh",
            "#pragma unroll 2\n  for (int turn = 0; turn * kWarp * 8 < dim; turn++)",
            "for (int turn = 0; (turn + 1) * kWarp * 8 <= dim; turn++)", "sum_rows"),
    Mistake("bias sums run on into the next expert", "activation", "activation.cuh",
            "for (int i = 0; i < 8; i++) sum[i] = 0.f;\n    open = false;", "open = false;", "gelu"),
    Mistake("two runs share a partial row", "activation", "activation.cuh",
            "(static_cast<int64_t>(blockIdx.x) + expert) * width", "static_cast<int64_t>(blockIdx.x) * width", "gelu"),
    Mistake("dot products read without a barrier", "activation", "activation.cuh",
            f"if (!g.dgate) return;\n  {SYNC}", "if (!g.dgate) return;", "gelu"),
    Mistake("no barrier inside the block sum", "modulate", "modulate.cuh",
            f"= v[0];\n  {SYNC}", "= v[0];", "modulate"),
    Mistake("one buffer for two sums", "modulate", "modulate.cuh",
            "sums[t0 / kGroup % 2]", "sums[0]", "modulate"),
    Mistake("columns that do not exist in the variance", "modulate", "modulate.cuh",
            "columns[i] < dim ? v[i] - mean[t] : 0.f", "v[i] - mean[t]", "modulate"),
    Mistake("no wait for the tiles", "grouped_glu", "grouped_tiles.cuh",
            f"mbarrier_wait(ring.filled(step), Ring::parity(step));\n    {FENCE}", FENCE, "glu"),
    Mistake("the wrong parity", "grouped_glu", "grouped_tiles.cuh",
            f"{RELEASED} ^ 1);\n    mbarrier_arrive", f"{RELEASED});\n    mbarrier_arrive", "glu"),
    Mistake("a stage never released", "grouped_glu", "grouped_tiles.cuh",
            "if (threadIdx.x % kWarp == 0) mbarrier_arrive(ring.released(step));", "", "glu"),
    Mistake("a stage released before its products are done", "grouped_glu", "grouped_tiles.cuh",
            "    wgmma_wait<0>();\n    if (threadIdx.x % kWarp == 0) mbarrier_arrive(ring.released(step));",
            "    if (threadIdx.x % kWarp == 0) mbarrier_arrive(ring.released(step));\n    wgmma_wait<0>();", "glu"),
    Mistake("no wait for the products", "grouped_glu", "grouped_tiles.cuh", "    wgmma_wait<0>();\n", "", "glu"),
    Mistake("half a descriptor step", "grouped_glu", "grouped_tiles.cuh",
            "(left, rows + 2 * q, l + kDepthStep * q);", "(left, rows + q, l + kDepthStep / 2 * q);", "glu"),
    Mistake("fewer bytes expected than come", "grouped_glu", "grouped_tiles.cuh",
            "mbarrier_arrive_expect(ring.filled(step), kStageBytes);",
            "mbarrier_arrive_expect(ring.filled(step), kStageBytes - kRowTileBytes);", "glu"),
    Mistake("barriers used before they are made", "grouped_glu", "grouped_tiles.cuh",
            f"mbarrier_init_done();\n  }}\n  {SYNC}", "mbarrier_init_done();\n  }", "glu"),
    Mistake("a row of the next expert written", "grouped_glu", "grouped_glu.cuh",
            "if (r >= end) continue;", "if (r > end) continue;", "glu"),
    Mistake("the wrong parity before a gather", "grouped_glu", "grouped_tiles.cuh",
            f"{RELEASED} ^ 1);\n    if (threadIdx.x == 0)", f"{RELEASED});\n    if (threadIdx.x == 0)", "glu_gather"),
    Mistake("an arrival that does not wait for the copies", "grouped_glu", "grouped_tiles.cuh",
            "mbarrier_arrive_after_copies(ring.filled(step));", "mbarrier_arrive(ring.filled(step));", "glu_gather"),
    Mistake("the producers' arrivals not counted", "grouped_glu", "grouped_tiles.cuh",
            "gathers ? 1 + kProducers : 1", "1", "glu_gather"),
    Mistake("one arrival too few counted", "grouped_glu", "grouped_tiles.cuh",
            "gathers ? 1 + kProducers : 1", "gathers ? kProducers : 1", "glu_gather"),
    Mistake("more bytes expected than a gather's weights", "grouped_glu", "grouped_tiles.cuh",
            "mbarrier_arrive_expect(ring.filled(step), kWeightBytes);",
            "mbarrier_arrive_expect(ring.filled(step), kStageBytes);", "glu_gather"),
    Mistake("gathered rows not swizzled", "grouped_glu", "grouped_tiles.cuh",
            "(threadIdx.x % 8 ^ top % 8) * 16", "threadIdx.x % 8 * 16", "glu_gather"),
    Mistake("no fence between copies and products", "grouped_glu", "grouped_tiles.cuh", FENCE, "", "glu_gather"),
    Mistake("a row past the end gathered", "grouped_glu", "grouped_tiles.cuh",
            "if (r < end) valid |= 1u << i;\n      const int row = r < end ?",
            "valid |= 1u << i;\n      const int row = r <= end ?", "glu_gather"),
    Mistake("columns gathered past the row", "grouped_glu", "grouped_tiles.cuh",
            "const bool inside = depth + column < dim;", "const bool inside = true;", "glu_diverged"),
    Mistake("one shared tile too many", "grouped_glu", "grouped_tiles.cuh",
            "shared(static_cast<int>(index) < list.shared_tiles)",
            "shared(static_cast<int>(index) <= list.shared_tiles)", "glu_shared"),
    Mistake("shared tiles by the routed row tiles", "grouped_glu", "grouped_tiles.cuh",
            "shared ? list.shared_row_tiles : list.row_tiles", "list.row_tiles", "glu_shared"),
    Mistake("half a step down the upright operand", "grouped_dglu", "grouped_tiles.cuh",
            "kUpright ? 16 * kRowBytes / 16", "kUpright ? 8 * kRowBytes / 16", "dglu"),
    Mistake("boxes of columns looked for in the wrong place", "grouped_dglu", "grouped_tiles.cuh",
            "upright_descriptor(w_left, kWeightBytes / 4)", "upright_descriptor(w_left, kWeightBytes / 8)", "dglu"),
    Mistake("a column tile's gate sums over another's", "grouped_dglu", "grouped_dglu.cuh",
            "part.gate_partial[column_tile * part.rows + r]", "part.gate_partial[r]", "dglu"),
    Mistake("half of a row's lanes in the gate sum", "grouped_dglu", "grouped_dglu.cuh",
            "dot += __shfl_xor_sync(kAllLanes, dot, 2);", "", "dglu"),
    Mistake("gate sums added before they are written", "grouped_dglu", "grouped_dglu.cu",
            f"{DGLU_LAUNCH}\n{DGLU_GATES}", f"{DGLU_GATES}\n{DGLU_LAUNCH}", "dglu"),
]  # fmt: skip


def replace_once(path: Path, old: str, new: str) -> None:
    """Fails when the source has changed so that the place is no longer there."""
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path.name}: {text.count(old)} times {old!r}"
    path.write_text(text.replace(old, new), encoding="utf-8")


def built(family: str, mistake: Mistake | None, sanitize: bool = False) -> Path:
    """The library of a slim copy of the family, with the mistake planted."""
    import emulation

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "csrc"
        shutil.copytree(emulation.SOURCES, copy)
        for file, edits in SLIM.items():
            for old, new in edits:
                replace_once(copy / "cuda" / file, old, new)
        if mistake:
            replace_once(copy / "cuda" / mistake.file, mistake.old, mistake.new)
        return emulation.build(copy, (family,), sanitize, optimize=family.startswith("grouped"))


def run_check(library: str, check: str) -> None:
    """Runs the test of that name on the library; raises or ends the process when it fails."""
    import calls
    import emulation
    import torch

    torch.set_num_threads(1)
    module, function, arguments = CHECKS[check]
    arguments = [torch.float32 if a == "F32" else a for a in arguments]
    getattr(importlib.import_module(module), function)(calls.Kernels(emulation.Library(Path(library))), *arguments)


def how_it_fails(library: str, check: str) -> str | None:
    """The last line that the check printed before it failed, or None."""
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            try:
                run_check(library, check)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", flush=True)
                os._exit(1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        output.seek(0)
        lines = output.read().decode(errors="replace").strip().splitlines()
    if status == 0:
        return None
    telling = [line for line in lines if "ERROR: AddressSanitizer" in line]
    return (telling or lines or [f"status {status}"])[-1]


if __name__ == "__main__":
    import faulthandler

    import torch

    for extra in (HERE, HERE.parents[1], HERE.parents[0]):
        sys.path.insert(0, str(extra))
    faulthandler.disable()
    torch.set_num_threads(1)
    pairs = [word.rsplit(":", 1) for word in sys.argv[1:]]
    modules = {CHECKS[check][0] for _, check in pairs}
    if len(pairs) > 1:  # what autograd imports at its first gradient: here once, not in every check's process
        modules.add("torch.fx.experimental.symbolic_shapes")
    for module in modules:
        importlib.import_module(module)
    print(json.dumps([how_it_fails(library, check) for library, check in pairs]))
