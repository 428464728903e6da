"""The Titans memory (arXiv 2501.00663, eqs. 8-18), linear: `M(x) = x @ W`.

Legend: B batch (or packed sequences N), T tokens, H heads, K key dim, V value dim.
"""

import torch
from torch import Tensor


def titans_linear(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, H, V]
    lr: Tensor,  # [B, T, H]
    momentum: Tensor | None,  # [B, T, H]
    decay: Tensor | None,  # [B, T, H]
    weights: Tensor,  # [B, H, K, V]
    momenta: Tensor | None,  # [B, H, K, V]; None: zeros
    anchor: Tensor | None,  # [B, H, K, V]; None: the call starts at a chunk boundary
    position: Tensor | None,  # [B]; None: zeros
    cu_seqlens: Tensor | None,  # [N + 1]; then B of q is 1 and the state's rows are the N sequences
    chunk_size: int,
    objective: str,
    read: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Token by token. Returns o [B, T, H, V] and the final weights, momenta and anchor.

    S_t = momentum_t S_{t-1} - lr_t grad_t          grad_t = k_t^T e_t,  e_t taken at the anchor
    W_t = (1 - decay_t) W_{t-1} + S_t               e_t = k_t @ W_anchor - v_t (l2), -v_t (dot)
    o_t = q_t @ W_t (after) | q_t @ W_{t-1} (before) | q_t @ W_anchor (chunk)
    """
    if cu_seqlens is not None:
        return _each_sequence(
            titans_linear, cu_seqlens, (q, k, v, lr, momentum, decay), (weights, momenta, anchor,
            position),
            chunk_size, objective, read,
        )  # fmt: skip
    batch, tokens = q.shape[:2]
    dtype = weights.dtype
    q, k, v, out_dtype = q.to(dtype), k.to(dtype), v.to(dtype), q.dtype
    if position is None:
        position = torch.zeros(batch, dtype=torch.int64, device=q.device)
    if momentum is not None and momenta is None:
        momenta = torch.zeros_like(weights)
    if anchor is None:
        anchor = weights

    def at_anchor(step: int) -> Tensor:  # the weights, in the rows where `step` tokens end a chunk
        boundary = ((position + step) % chunk_size == 0)[:, None, None, None]
        return torch.where(boundary, weights, anchor)

    outputs = []
    for t in range(tokens):
        anchor = at_anchor(t)
        before = weights
        error = -v[:, t]
        if objective == "l2":
            error = error + _rows_times(k[:, t], anchor)
        update = -_gate(lr, t) * k[:, t, :, :, None] * error[:, :, None, :]
        if momentum is not None:
            update = momenta = _gate(momentum, t) * momenta + update
        kept = weights if decay is None else (1 - _gate(decay, t)) * weights
        weights = kept + update
        source = {"after": weights, "before": before, "chunk": anchor}[read]
        outputs.append(_rows_times(q[:, t], source))
    out = torch.stack(outputs, 1) if outputs else v.new_zeros(v.shape)
    return out.to(out_dtype), weights, momenta, at_anchor(tokens)


def titans_linear_chunked(
    q, k, v, lr, momentum, decay, weights, momenta, anchor, position, cu_seqlens, chunk_size,
    objective, read,
    product_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """The same by chunks (the dual form), with the operands of every product rounded to
    `product_dtype`.

    This is the accuracy that a tensor-core kernel of that dtype can have (products of rounded
    operands, accumulation and state in full), so it is the tests' yardstick for bfloat16 and
    float16.

        n_t = momentum_t n_{t-1} + lr_t 1_t     A_t = (1 - decay_t) A_{t-1} + n_t     (rows over the
        chunk's tokens)
        O = b * (Q W) + c * (Q S) - (A * Q K^T) E;  W' and S' take the last rows of the same
        coefficients
    """
    if len(q) == 0:
        return titans_linear(
            q, k, v, lr, momentum, decay, weights, momenta, anchor, position, cu_seqlens,
            chunk_size, objective, read
        )  # fmt: skip
    if cu_seqlens is None and len(q) != 1:
        rows = [
            titans_linear_chunked(
                *[None if x is None else x[i : i + 1] for x in (q, k, v, lr, momentum, decay)],
                *[None if x is None else x[i : i + 1] for x in (weights, momenta, anchor,
                position)],
                None, chunk_size, objective, read, product_dtype,
            )
            for i in range(len(q))
        ]  # fmt: skip
        return tuple(None if x[0] is None else torch.cat(x) for x in zip(*rows, strict=True))
    if cu_seqlens is not None:
        return _each_sequence(
            titans_linear_chunked, cu_seqlens, (q, k, v, lr, momentum, decay), (weights, momenta,
            anchor, position),
            chunk_size, objective, read, product_dtype,
        )  # fmt: skip

    def product(a: Tensor, b: Tensor) -> Tensor:
        return _RoundedProduct.apply(a, b, product_dtype)

    out_dtype, dtype, tokens = q.dtype, weights.dtype, q.shape[1]
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))  # [1, H, T, .]
    keep = None if decay is None else 1 - decay
    offset = 0 if position is None else int(position)
    if momentum is not None and momenta is None:
        momenta = torch.zeros_like(weights)
    anchor = weights if anchor is None else anchor
    outputs, start = [v[:, :, :0]], 0
    while start < tokens:
        if (offset + start) % chunk_size == 0:
            anchor = weights
        stop = min(tokens, start + chunk_size - (offset + start) % chunk_size)
        here = slice(start, stop)
        n_row = torch.zeros_like(lr[:, here].transpose(1, 2))  # [1, H, c]
        a_row, b, c, m = (
            n_row,
            torch.ones_like(n_row[..., :1]),
            torch.zeros_like(n_row[..., :1]),
            None,
        )
        m = b if momentum is not None else c
        rows, coefficients = [], []
        if read == "before":
            rows.append(a_row), coefficients.append((b, c))
        for t in range(start, stop):
            one = torch.zeros_like(n_row).index_fill(
                -1, torch.tensor(t - start, device=q.device), 1.0
            )
            n_row = (
                n_row * (0 if momentum is None else momentum[:, t, :, None])
                + lr[:, t, :, None] * one
            )
            m = m if momentum is None else m * momentum[:, t, :, None]
            kept = 1 if keep is None else keep[:, t, :, None]
            a_row, b, c = kept * a_row + n_row, kept * b, kept * c + m
            rows.append(a_row), coefficients.append((b, c))
        size = stop - start
        matrix = torch.stack(rows[:size], -2)  # [1, H, c, c]
        b_read = torch.stack([x[0] for x in coefficients[:size]], -2)
        c_read = torch.stack([x[1] for x in coefficients[:size]], -2)
        qc, kc, vc = q[:, :, here], k[:, :, here], v[:, :, here]
        error = product(kc, anchor) - vc if objective == "l2" else -vc
        if read == "chunk":
            out = product(qc, anchor)
        else:
            out = b_read * product(qc, weights) - product(matrix * product(qc, kc.mT), error)
            if momentum is not None:
                out = out + c_read * product(qc, momenta)
        outputs.append(out)
        update = product(kc.mT, a_row[..., None] * error)
        if momentum is None:
            weights = b[..., None] * weights - update
        else:
            weights, momenta = (
                b[..., None] * weights + c[..., None] * momenta - update,
                m[..., None] * momenta - product(kc.mT, n_row[..., None] * error),
            )
        start = stop
    if (offset + tokens) % chunk_size == 0:
        anchor = weights
    return torch.cat(outputs, 2).transpose(1, 2).to(out_dtype), weights, momenta, anchor


def _rows_times(x: Tensor, w: Tensor) -> Tensor:  # [B, H, K], [B, H, K, V] -> [B, H, V]
    return (x[:, :, None, :] @ w)[:, :, 0]


def _gate(gate: Tensor, t: int) -> Tensor:  # [B, T, H] -> [B, H, 1, 1]
    return gate[:, t, :, None, None]


def _each_sequence(function, cu_seqlens, token_inputs, row_inputs, *options):
    """Runs `function` on each packed sequence alone, with its own row of the state."""
    bounds = cu_seqlens.tolist()
    results = [
        function(
            *[None if x is None else x[:, bounds[i] : bounds[i + 1]] for x in token_inputs],
            *[None if x is None else x[i : i + 1] for x in row_inputs],
            None,
            *options,
        )
        for i in range(len(bounds) - 1)
    ]
    if not results:
        weights, momenta, anchor, _ = row_inputs
        if token_inputs[4] is not None and momenta is None:
            momenta = torch.zeros_like(weights)
        return (
            torch.zeros_like(token_inputs[2]),
            weights,
            momenta,
            weights if anchor is None else anchor,
        )
    outputs, *states = zip(*results, strict=True)
    return (torch.cat(outputs, 1), *[None if x[0] is None else torch.cat(x) for x in states])


class _RoundedProduct(torch.autograd.Function):
    """a @ b with the operands rounded to `dtype`, in the backward's products as well."""

    @staticmethod
    def forward(ctx, a, b, dtype):
        ctx.save_for_backward(a, b)
        ctx.dtype = dtype
        return _RoundedProduct.product(a, b, dtype)

    @staticmethod
    def product(a, b, dtype):
        return a @ b if dtype is None else a.to(dtype).to(a.dtype) @ b.to(dtype).to(b.dtype)

    @staticmethod
    def backward(ctx, gradient):
        a, b = ctx.saved_tensors
        product = _RoundedProduct.product
        return product(gradient, b.mT, ctx.dtype), product(a.mT, gradient, ctx.dtype), None
