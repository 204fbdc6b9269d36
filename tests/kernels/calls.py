"""Each launcher as a function of torch tensors, with poisoned and guarded outputs."""

import torch
from emulation import DTYPES, Library, Memory
from torch import Tensor


class Kernels:
    """The operations of one emulated library."""

    def __init__(self, library: Library, offset: int = 0):
        """offset: elements by which outputs lie off their 16-byte alignment."""
        self.library, self.offset = library, offset

    def _run(self, name: str, memory: Memory, *arguments: object) -> None:
        status = self.library.call(name, *arguments, None)
        assert status == 0, f"{name} returned {status}"
        memory.verify()

    def route(self, x: Tensor, weight: Tensor, k: int, renormalize: bool, bias: Tensor | None = None) -> dict[str, Tensor]:
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
