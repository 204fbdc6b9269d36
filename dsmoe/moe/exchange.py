"""Rows under way between ranks: an all-to-all in two halves, with other work between them, forward and backward."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dsmoe.runtime import distributed


class Exchange:
    """One all-to-all of rows [sum(send), D] -> [sum(receive), D]; send[r] go to rank r of the group, receive[r] come.

    What is computed between `start` and `finish` overlaps with the transfer, and so does its gradient: the backward
    pass of `finish` sends the gradients off, that of `start` waits for them. Use an instance once.
    """

    def __init__(self, send: Sequence[int], receive: Sequence[int], group: ProcessGroup) -> None:
        self.send, self.receive, self.group = list(send), list(receive), group
        self.forward: distributed.Transfer | None = None
        self.backward: distributed.Transfer | None = None
        self._arriving: Tensor | None = None

    def start(self, rows: Tensor) -> None:
        """Send rows off; this rank's place in their gradient is kept here."""
        self._arriving = _Start.apply(rows, self)

    def finish(self) -> Tensor:
        """The rows that came, by source rank."""
        arriving, self._arriving = self._arriving, None
        return _Finish.apply(arriving, self)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.forward = distributed.start_all_to_all(rows, exchange.send, exchange.receive, exchange.group)
        return exchange.forward.rows

    @staticmethod
    def backward(ctx, placeholder: Tensor) -> tuple[Tensor, None]:
        transfer, ctx.exchange.backward = ctx.exchange.backward, None
        return transfer.wait(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, arriving: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        transfer, exchange.forward = exchange.forward, None
        transfer.wait()
        return arriving.view_as(arriving)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        exchange.backward = distributed.start_all_to_all(
            gradient.contiguous(), exchange.receive, exchange.send, exchange.group
        )
        # Of the shape that autograd asks for; what counts is on its way and is picked up by `_Start`.
        return gradient, None
