"""Each launcher as a function of torch tensors, with poisoned and guarded outputs."""

import torch
from emulation import DTYPES, Library, Memory
from torch import Tensor

KINDS = {"swiglu": 0, "gelu": 1}


class Kernels:
    """The operations of one emulated library."""

    def __init__(self, library: Library, offset: int = 0):
        """offset: elements by which outputs lie off their 16-byte alignment."""
        self.library, self.offset = library, offset

    def _run(self, name: str, memory: Memory, *arguments: object) -> None:
        status = self.library.call(name, *arguments, None)
        assert status == 0, f"{name} returned {status}"
        memory.verify()

    def route(
        self, x: Tensor, weight: Tensor, k: int, renormalize: bool, bias: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The fields of dsmoe.ops.Routing, ends and prob_sum."""
        (n, d), e, memory = x.shape, weight.shape[0], Memory(self.offset)
        out = {
            "probs": memory.new(n, e),
            "gates": memory.new(n, k),
            "indices": memory.new(n, k, dtype=torch.int64),
            "counts": memory.new(e, dtype=torch.int64),
            "ends": memory.new(e, dtype=torch.int32),
            "order": memory.new(n * k, dtype=torch.int64),
            "position": memory.new(n, k, dtype=torch.int64),
            "logsumexp": memory.new(n),
            "prob_sum": memory.new(e),
        }
        scratch = memory.scratch(self.library.call("route_scratch_bytes", n, e))
        self._run("route", memory, DTYPES[x.dtype], n, d, e, k, renormalize, x, weight, bias, *out.values(), scratch)
        return out

    def route_backward(self, routed: dict[str, Tensor], renormalize: bool, grads: dict[str, Tensor | None]) -> Tensor:
        """dlogits from the gradients of probs, gates, logsumexp and prob_sum."""
        (n, e), k, memory = routed["probs"].shape, routed["gates"].shape[1], Memory(self.offset)
        out = memory.new(n, e)
        saved = [routed[name] for name in ("probs", "gates", "indices")]
        given = [grads.get(name) for name in ("probs", "gates", "logsumexp", "prob_sum")]
        self._run("route_backward", memory, n, e, k, renormalize, *saved, *given, out)
        return out

    def gather_rows(self, x: Tensor, order: Tensor, k: int) -> Tensor:
        """x[order // k]."""
        (n, d), memory = x.shape, Memory(self.offset)
        rows = memory.new(n * k, d, dtype=x.dtype)
        self._run("gather_rows", memory, DTYPES[x.dtype], n, d, k, x, order, rows)
        return rows

    def sum_rows(
        self, rows: Tensor, position: Tensor, out_dtype: torch.dtype, images: int = 1, *, branch: bool = False, **extra
    ) -> dict[str, Tensor]:
        """extra: gates, add, residual, ada_gate (rows of ada_gate may lie apart)."""
        (n, k), d, memory = position.shape, rows.shape[1], Memory(self.offset)
        out = {"out": memory.new(n, d, dtype=out_dtype)}
        if branch:
            out["branch"] = memory.new(n, d, dtype=rows.dtype)
        ada_gate = extra.get("ada_gate")
        self._run(
            "sum_rows",
            memory,
            *(DTYPES[rows.dtype], DTYPES[out_dtype], n, d, k, images, rows, position),
            *(extra.get("gates"), extra.get("add"), extra.get("residual")),
            *(ada_gate, 0 if ada_gate is None else ada_gate.stride(0), out["out"], out.get("branch")),
        )
        return out

    def sum_rows_backward(
        self, dout: Tensor, rows: Tensor, position: Tensor, wanted: tuple[str, ...], images: int = 1, **extra
    ) -> dict[str, Tensor]:
        """wanted: of drows, dgates, dbranch, dada_gate. extra: gates, branch, ada_gate."""
        (n, k), d, memory = position.shape, rows.shape[1], Memory(self.offset)
        shapes = {
            "drows": ((n * k, d), rows.dtype),
            "dgates": ((n, k), torch.float32),
            "dbranch": ((n, d), rows.dtype),
            "dada_gate": ((images, d), rows.dtype),
        }
        out = {name: memory.new(*shape, dtype=dtype) for name, (shape, dtype) in shapes.items() if name in wanted}
        ada_gate = extra.get("ada_gate")
        scratch = memory.scratch(self.library.call("sum_rows_backward_scratch_bytes", n, d, images))
        self._run(
            "sum_rows_backward",
            memory,
            *(DTYPES[rows.dtype], DTYPES[dout.dtype], n, d, k, images, dout, rows, position),
            *(extra.get("gates"), extra.get("branch"), ada_gate, 0 if ada_gate is None else ada_gate.stride(0)),
            *(out.get(name) for name in shapes),
            scratch,
        )
        return out

    def expert_act(self, kind: str, h: Tensor, **extra) -> Tensor:
        """extra: up, bias, ends, gate."""
        (r, f), memory, bias = h.shape, Memory(self.offset), extra.get("bias")
        a = memory.new(r, f, dtype=h.dtype)
        experts, stride = (0, 0) if bias is None else (bias.shape[0], bias.stride(0))
        given = (h, extra.get("up"), bias, stride, extra.get("ends"), extra.get("gate"))
        self._run("expert_act", memory, DTYPES[h.dtype], KINDS[kind], r, f, experts, *given, a)
        return a

    def expert_act_backward(
        self, kind: str, da: Tensor, h: Tensor, wanted: tuple[str, ...], **extra
    ) -> dict[str, Tensor]:
        """wanted: of dup, dbias, dgate, a; dh always. extra: up, bias, ends, gate."""
        (r, f), memory, bias = h.shape, Memory(self.offset), extra.get("bias")
        experts, stride = (0, 0) if bias is None else (bias.shape[0], bias.stride(0))
        shapes = {
            "dh": ((r, f), h.dtype),
            "dup": ((r, f), h.dtype),
            "dbias": ((experts, f), h.dtype),
            "dgate": ((r,), torch.float32),
            "a": ((r, f), h.dtype),
        }
        out = {n: memory.new(*shape, dtype=dt) for n, (shape, dt) in shapes.items() if n in ("dh", *wanted)}
        given = (da, h, extra.get("up"), bias, stride, extra.get("ends"), extra.get("gate"))
        scratch = memory.scratch(self.library.call("expert_act_backward_scratch_bytes", r, f, experts))
        results = [out.get(name) for name in shapes]
        sizes = (DTYPES[h.dtype], KINDS[kind], r, f, experts)
        self._run("expert_act_backward", memory, *sizes, *given, *results, scratch)
        return out

    def modulate(self, x: Tensor, shift: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """y, mean and rstd; rows of shift and scale may lie apart."""
        (b, t, d), memory = x.shape, Memory(self.offset)
        out = {"y": memory.new(b, t, d, dtype=x.dtype), "mean": memory.new(b, t), "rstd": memory.new(b, t)}
        self._run("modulate", memory, DTYPES[x.dtype], b, t, d, x, shift, scale, scale.stride(0), *out.values())
        return out

    def modulate_backward(self, dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> dict[str, Tensor]:
        """dx, dshift, dscale."""
        (b, t, d), memory, dtype = x.shape, Memory(self.offset), x.dtype
        out = {"dx": memory.new(b, t, d, dtype=dtype)}
        out |= {name: memory.new(b, d, dtype=dtype) for name in ("dshift", "dscale")}
        scratch = memory.scratch(self.library.call("modulate_backward_scratch_bytes", b, t, d))
        given = (dy, x, scale, scale.stride(0), mean, rstd)
        self._run("modulate_backward", memory, DTYPES[dtype], b, t, d, *given, *out.values(), scratch)
        return out

    def grouped_glu(self, x: Tensor, w_gate: Tensor, w_up: Tensor, ends: Tensor, **extra) -> dict[str, Tensor]:
        """a, h, up, and with `shared` those of the shared expert. extra: order and k, gate, shared (its two matrices),
        only_a (leaves h and up out)."""
        (n, d), (e, f, _), memory, k = x.shape, w_gate.shape, Memory(self.offset), extra.get("k", 1)
        shared = extra.get("shared", (None, None))
        wide = 0 if shared[0] is None else shared[0].shape[0]
        names = ("a",) if extra.get("only_a") else ("a", "h", "up")
        out = {name: memory.new(n * k, f, dtype=x.dtype) for name in names}
        if wide:
            out |= {f"shared_{name}": memory.new(n, wide, dtype=x.dtype) for name in names}
        given = (x, extra.get("order"), w_gate, w_up, ends, extra.get("gate"))
        routed, beside = (map(out.get, ("a", "h", "up")), map(out.get, ("shared_a", "shared_h", "shared_up")))
        self._run("grouped_glu", memory, DTYPES[x.dtype], n, d, f, e, k, *given, *routed, wide, *shared, *beside)
        return out

    def grouped_dglu(self, dy: Tensor, w2: Tensor, ends: Tensor, h: Tensor, up: Tensor, **extra) -> dict[str, Tensor]:
        """dh, dup, with a gate dgate, a unless `without_a`, and with `shared` those of the shared expert but dgate.
        extra: order and k, gate, shared (its second matrix, h and up)."""
        (n, d), (e, _, f), memory, k = dy.shape, w2.shape, Memory(self.offset), extra.get("k", 1)
        shared, gate = extra.get("shared", (None, None, None)), extra.get("gate")
        wide = 0 if shared[0] is None else shared[0].shape[1]
        names = ("dh", "dup") if extra.get("without_a") else ("dh", "dup", "a")
        out = {name: memory.new(n * k, f, dtype=dy.dtype) for name in names}
        if gate is not None:
            out["dgate"] = memory.new(n * k)
        if wide:
            out |= {f"shared_{name}": memory.new(n, wide, dtype=dy.dtype) for name in names}
        routed = map(out.get, ("dh", "dup", "a", "dgate"))
        beside = map(out.get, ("shared_dh", "shared_dup", "shared_a"))
        scratch = memory.scratch(self.library.call("grouped_dglu_scratch_bytes", n * k, f))
        sizes = (DTYPES[dy.dtype], n, d, f, e, k)
        given = (dy, extra.get("order"), w2, ends, h, up, gate)
        self._run("grouped_dglu", memory, *sizes, *given, *routed, wide, *shared, *beside, scratch)
        return out
