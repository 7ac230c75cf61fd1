"""The selective scan: a linear recurrence whose decay, input and output depend on the token.

Block by block in plain PyTorch, on any device; by the CUDA kernel of mamba-ssm where there is one.
"""

from collections.abc import Callable
from functools import cache
from math import ceil, sqrt

import torch
from torch import Tensor, library
from torch.autograd.function import FunctionCtx
from torch.nn.functional import pad


def selective_scan(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor) -> Tensor:
    """Run a state space model with a diagonal state matrix along a sequence.

        h_l = exp(dt_l a) h_(l-1) + dt_l u_l b_l,    h_0 = 0 before the first token
        y_l = c_l . h_l + skip u_l

    Autograd keeps the inputs only; the backward pass computes the states again and holds them once,
    4 B L D N bytes, for that time. Computes in fp32 without autocast (in fp64 if u is). On CUDA the
    kernel of mamba-ssm takes over if it is really installed; its gradients are sums in random
    order, so runs with it do not repeat bit by bit. Without it the scan is one operator to
    `torch.compile`, which would unroll its loops.

    Args:
        u: input, (B, L, D).
        dt: step sizes, same shape, at least 0; 0 copies the state.
        a: (D, N), below 0.
        b: what of the input enters the state, (B, L, N).
        c: what of the state is read, (B, L, N).
        skip: (D,).

    Returns:
        y, (B, L, D), in the precision of u. Gradients flow to all inputs, once (no second ones).

    Raises:
        ValueError: shapes do not fit.

    Source: Gu & Dao 2023 (Mamba), arXiv:2312.00752, Algorithm 2.
    """
    (batch, length, channels), state = u.shape, a.shape[1]
    expected = {
        "dt": (dt, (batch, length, channels)),
        "a": (a, (channels, state)),
        "b": (b, (batch, length, state)),
        "c": (c, (batch, length, state)),
        "skip": (skip, (channels,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}, but u of {tuple(u.shape)} and {state} states "
                f"need {shape}."
            )
    if u.is_cuda and u.dtype != torch.float64 and _has_kernel():
        return _run_kernel(u, dt, a, b, c, skip)
    return blockwise_scan(u, dt, a, b, c, skip)


@cache
def cuda_kernel() -> Callable[..., Tensor] | None:
    """Return the scan of mamba-ssm, or None without its CUDA extension.

    That the package can be imported says nothing: since 2.3 it is installed without the extension
    unless asked for. Broken installations raise errors of any kind.
    """
    try:
        from mamba_ssm.ops import selective_scan_interface as interface

        return None if interface.selective_scan_cuda is None else interface.selective_scan_fn
    except Exception:
        return None


@torch.compiler.assume_constant_result
def _has_kernel() -> bool:
    return cuda_kernel() is not None


@torch.compiler.disable  # not made for it
def _run_kernel(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor) -> Tensor:
    """Run the kernel, which has tokens last."""
    kernel = cuda_kernel()
    assert kernel is not None
    with torch.autocast(u.device.type, enabled=False):
        tokens = (x.float().transpose(1, 2).contiguous() for x in (u, dt, b, c))
        u_last, dt_last, b_last, c_last = tokens
        y = kernel(u_last, dt_last, a.float(), b_last, c_last, skip.float())
        return y.transpose(1, 2).to(u.dtype)


@library.custom_op("nnunet_ssl::selective_scan", mutates_args=())
def blockwise_scan(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor) -> Tensor:
    """Scan block by block; arguments and result as those of `selective_scan`.

    The sequence is cut into blocks, which run side by side, token t of all blocks at once: first
    from a state of 0, which tells how each block ends; these ends are carried from block to block;
    then from the right state. So L tokens take some 5 sqrt(L) steps. A closed form by sums of
    exp(-a dt) would overflow within a block.
    """
    with torch.autocast(u.device.type, enabled=False):
        scan = _Blocks(u, dt, a, b, c, skip)
        y = torch.empty_like(scan.u)
        state = scan.first_states()
        for t in range(scan.size):
            state = scan.step(t, state)
            torch.matmul(state, scan.c[t, ..., None], out=y[t, ..., None])
        y.addcmul_(scan.u, scan.skip)
        return scan.joined(y).to(u.dtype).contiguous()


@library.custom_op("nnunet_ssl::selective_scan_gradients", mutates_args=())
def blockwise_gradients(
    grad: Tensor, u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of a scan's inputs from that of y: the recurrence run backwards."""
    with torch.autocast(grad.device.type, enabled=False):
        inputs = (u, dt, a, b, c, skip)
        grads = _Blocks(*inputs).gradients(grad)
        made = (g.to(x.dtype).contiguous() for g, x in zip(grads, inputs, strict=True))
        du, ddt, da, db, dc, dskip = made
        return du, ddt, da, db, dc, dskip


def _keep_inputs(ctx: FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _run_backwards(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, ...]:
    return blockwise_gradients(grad, *ctx.saved_tensors)  # type: ignore[attr-defined]


@blockwise_scan.register_fake
def _(u: Tensor, *others: Tensor) -> Tensor:
    return u.new_empty(u.shape)


@blockwise_gradients.register_fake
def _(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs)


blockwise_scan.register_autograd(_run_backwards, setup_context=_keep_inputs)


class _Blocks:
    """Inputs of a scan cut into G blocks of T tokens, as (T, B, G, channels).

    Tokens that fill up the last block have dt = 0: they copy the state.
    """

    def __init__(self, u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor):
        self.dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
        self.length = u.shape[1]
        # a step over the tokens of a block takes many operations, one over blocks a single one
        self.size = ceil(sqrt(self.length) / 4)
        self.u, self.dt, self.b, self.c = (self.cut(x) for x in (u, dt, b, c))
        self.a, self.skip = a.to(self.dtype), skip.to(self.dtype)
        self.scaled = self.dt * self.u
        self.block_decay = torch.exp(self.dt.sum(0)[..., None] * self.a)  # (B, G, D, N)

    def cut(self, x: Tensor) -> Tensor:
        """Cut (B, L, channels) into (T, B, G, channels)."""
        x = pad(x.to(self.dtype), (0, 0, 0, -self.length % self.size))
        return x.unflatten(1, (-1, self.size)).permute(2, 0, 1, 3).contiguous()

    def joined(self, x: Tensor) -> Tensor:
        """Undo `cut`."""
        return x.permute(1, 2, 0, 3).flatten(1, 2)[:, : self.length]

    def decay(self, t: int) -> Tensor:
        """Return what is left of the state after token t of each block, (B, G, D, N)."""
        return torch.exp(self.dt[t, ..., None] * self.a)

    def step(self, t: int, state: Tensor) -> Tensor:
        """Return the states (B, G, D, N) after token t of each block from those before."""
        entering = self.scaled[t, ..., None] * self.b[t, ..., None, :]
        return entering.addcmul_(self.decay(t), state)

    def first_states(self) -> Tensor:
        """Return the state before each block, (B, G, D, N)."""
        state = torch.zeros_like(self.block_decay)
        for t in range(self.size):
            state = self.step(t, state)
        return carried(state, self.block_decay)

    def gradients(self, grad: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of u, dt, a, b, c and skip from that of y, (B, L, D)."""
        grad_y = self.cut(grad)
        states = torch.empty(
            (self.size + 1, *self.block_decay.shape), dtype=self.dtype, device=grad.device
        )
        states[0] = self.first_states()
        for t in range(self.size):
            states[t + 1] = self.step(t, states[t])

        # what reaches the state before token t from it and all later ones
        flow = torch.zeros_like(self.block_decay)
        for t in reversed(range(self.size)):
            flow = flow.addcmul_(grad_y[t, ..., None], self.c[t, ..., None, :]).mul_(self.decay(t))
        flow = carried(flow.flip(1), self.block_decay.flip(1)).flip(1)

        grad_scaled, grad_dt = torch.empty_like(self.u), torch.empty_like(self.u)
        grad_b, grad_c = torch.empty_like(self.b), torch.empty_like(self.c)
        grad_a = torch.zeros_like(self.a)
        for t in reversed(range(self.size)):
            flow.addcmul_(grad_y[t, ..., None], self.c[t, ..., None, :])  # now of the state after t
            torch.matmul(grad_y[t, ..., None, :], states[t + 1], out=grad_c[t, ..., None, :])
            torch.matmul(flow, self.b[t, ..., None], out=grad_scaled[t, ..., None])
            torch.matmul(self.scaled[t, ..., None, :], flow, out=grad_b[t, ..., None, :])
            flow.mul_(self.decay(t))
            exponent = flow * states[t]  # gradient of dt a
            grad_a += (exponent * self.dt[t, ..., None]).sum((0, 1))
            torch.sum(exponent.mul_(self.a), -1, out=grad_dt[t])
        grad_dt.addcmul_(grad_scaled, self.u)
        grad_u = (grad_scaled * self.dt).addcmul_(grad_y, self.skip)
        grad_skip = (grad_y * self.u).sum((0, 1, 2))
        along = (self.joined(g) for g in (grad_u, grad_dt, grad_b, grad_c))
        grad_u, grad_dt, grad_b, grad_c = along
        return grad_u, grad_dt, grad_a, grad_b, grad_c, grad_skip


def carried(ends: Tensor, decay: Tensor) -> Tensor:
    """Return the state before each block.

    Args:
        ends: state after each block if it began with 0, (B, G, D, N).
        decay: what is left after the block of a state before it, same shape.
    """
    starts = torch.zeros_like(ends)
    for g in range(ends.shape[1] - 1):
        torch.addcmul(ends[:, g], decay[:, g], starts[:, g], out=starts[:, g + 1])
    return starts
