"""The Titans memory (arXiv 2501.00663, eqs. 8-18): linear, `M(x) = x @ W`, and as a network.

Legend: B batch (or packed sequences N), T tokens, H heads, K key dim, V value dim.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


def titans(*arguments):
    """What the operator `titans` computes; arguments and results are those of `titans_network`.

    A linear memory without a norm has a definition of its own, because it is simpler to read.
    """
    q, k, v, lr, momentum, decay, w1, w2, s1, _, a1, _, norm_weight, _, *rest = arguments
    if w2 is not None or norm_weight is not None:
        return titans_network(*arguments)
    position, cu_seqlens, chunk_size, _, _, objective, read, _ = rest
    o, weights, momenta, anchor = titans_linear(
        *(q, k, v, lr, momentum, decay, w1, s1, a1),
        *(position, cu_seqlens, chunk_size, objective, read),
    )
    return o, weights, None, momenta, None, anchor, None


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


# ---- networks: two layers, or a norm -------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """`M(x) = x + N(core(x))`: core(x) = x @ W, or act(x @ W1) @ W2; N the LayerNorm, or nothing.

    Without `residual` the `x +` is left out, as it is for one layer without a norm.
    """

    activation: str  # "gelu" (its tanh approximation) or "silu"
    residual: bool
    norm_weight: Tensor | None  # [B, H, 1, V]; None: no norm
    norm_bias: Tensor | None
    norm_eps: float
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul

    def adds_input(self, layers: int) -> bool:
        return self.residual and (layers == 2 or self.norm_weight is not None)

    def act(self, z: Tensor) -> Tensor:
        return F.silu(z) if self.activation == "silu" else F.gelu(z, approximate="tanh")

    def slope(self, z: Tensor) -> Tensor:
        """act'(z)."""
        if self.activation == "silu":
            s = z.sigmoid()
            return s * (1 + z * (1 - s))
        scale = (2 / math.pi) ** 0.5
        t = (scale * (z + 0.044715 * z**3)).tanh()
        return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * scale * (1 + 3 * 0.044715 * z * z)

    def normalised(self, core: Tensor) -> tuple[Tensor, Tensor]:
        """(core - mean) / deviation, and 1 / deviation."""
        centred = core - core.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + self.norm_eps).rsqrt()
        return centred * scale, scale

    def output(self, x: Tensor, core: Tensor, layers: int) -> Tensor:
        if self.norm_weight is not None:
            core = self.normalised(core)[0] * self.norm_weight + self.norm_bias
        return x + core if self.adds_input(layers) else core

    def read(self, weights: Sequence[Tensor], x: Tensor) -> Tensor:
        """M(x), x [B, H, n, K]."""
        core = self.product(x, weights[0])
        if len(weights) == 2:
            core = self.product(self.act(core), weights[1])
        return self.output(x, core, len(weights))

    def gradients(
        self, weights: Sequence[Tensor], k: Tensor, v: Tensor, objective: str
    ) -> list[tuple[Tensor, Tensor]]:
        """(input, error) [B, H, n, .] of each layer: a token's gradient is input^T error."""
        inputs, core = [k], self.product(k, weights[0])
        if len(weights) == 2:
            z = core
            inputs.append(self.act(z))
            core = self.product(inputs[1], weights[1])
        error = -v if objective == "dot" else self.output(k, core, len(weights)) - v
        if self.norm_weight is not None:  # back through the LayerNorm
            normalised, scale = self.normalised(core)
            error = error * self.norm_weight
            along = normalised * (error * normalised).mean(-1, keepdim=True)
            error = scale * (error - error.mean(-1, keepdim=True) - along)
        errors = [error]
        if len(weights) == 2:
            errors.insert(0, self.product(error, weights[1].mT) * self.slope(z))
        return list(zip(inputs, errors, strict=True))


def titans_network(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, H, V]
    lr: Tensor,  # [B, T, H]
    momentum: Tensor | None,  # [B, T, H]
    decay: Tensor | None,  # [B, T, H]
    w1: Tensor,  # [B, H, K, F], or [B, H, K, V] without w2
    w2: Tensor | None,  # [B, H, F, V]
    s1: Tensor | None,  # momenta; None: zeros
    s2: Tensor | None,
    a1: Tensor | None,  # anchors; None: the call starts at a chunk boundary
    a2: Tensor | None,
    norm_weight: Tensor | None,  # [B, H, V]; None: no norm
    norm_bias: Tensor | None,  # [B, H, V]
    position: Tensor | None,  # [B]; None: zeros
    cu_seqlens: Tensor | None,  # [N + 1]; then B of q is 1 and the state's rows are the N sequences
    chunk_size: int,
    activation: str,
    residual: bool,
    objective: str,
    read: str,
    norm_eps: float,
) -> tuple[Tensor | None, ...]:
    """Token by token, as `titans_linear`, for every layer's matrix W with its input x and error e:

    S_t = momentum_t S_{t-1} - lr_t x_t^T e_t           x_t, e_t of the inner loss at the anchor
    W_t = (1 - decay_t) W_{t-1} + S_t
    o_t = M_{W_t}(q_t) (after) | M_{W_{t-1}}(q_t) (before) | M_{anchor}(q_t) (chunk)

    Returns o [B, T, H, V] and the final w1, w2, s1, s2, a1, a2 (None where there is none).
    """
    arguments = (q, k, v, lr, momentum, decay, w1, w2, s1, s2, a1, a2)
    options = (chunk_size, activation, residual, objective, read, norm_eps)
    if cu_seqlens is not None:
        return _each_sequence_of_network(
            titans_network, cu_seqlens, arguments, (norm_weight, norm_bias), position, options
        )
    weights, momenta, anchor, network = _network_state(arguments, norm_weight, norm_bias, options)
    tokens, out_dtype, dtype = q.shape[1], q.dtype, w1.dtype
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))  # [B, H, T, .]
    if position is None:
        position = torch.zeros(len(q), dtype=torch.int64, device=q.device)

    def at_anchor(step: int) -> list[Tensor]:
        boundary = ((position + step) % chunk_size == 0)[:, None, None, None]
        return [torch.where(boundary, w, a) for w, a in zip(weights, anchor, strict=True)]

    outputs = [v[:, :, :0]]
    for t in range(tokens):
        here, anchor, before = slice(t, t + 1), at_anchor(t), weights
        pairs = network.gradients(anchor, k[:, :, here], v[:, :, here], objective)
        updates = [-_gate(lr, t) * x.mT @ e for x, e in pairs]
        if momentum is not None:
            kept = [_gate(momentum, t) * s for s in momenta]
            updates = momenta = [s + u for s, u in zip(kept, updates, strict=True)]
        if decay is not None:
            weights = [(1 - _gate(decay, t)) * w for w in weights]
        weights = [w + u for w, u in zip(weights, updates, strict=True)]
        source = {"after": weights, "before": before, "chunk": anchor}[read]
        outputs.append(network.read(source, q[:, :, here]))
    out = torch.cat(outputs, 2).transpose(1, 2).to(out_dtype)
    return out, *_pairs(weights), *_pairs(momenta), *_pairs(at_anchor(tokens))


def titans_network_chunked(
    q, k, v, lr, momentum, decay, w1, w2, s1, s2, a1, a2, norm_weight, norm_bias, position,
    cu_seqlens, chunk_size, activation, residual, objective, read, norm_eps,
    product_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The same by chunks (the dual form), with the operands of every product rounded to
    `product_dtype`.

    This is the accuracy that a tensor-core kernel of that dtype can have (products of rounded
    operands, accumulation and state in full), so it is the tests' yardstick for bfloat16 and
    float16, for one layer too.

        n_t = momentum_t n_{t-1} + lr_t 1_t     A_t = (1 - decay_t) A_{t-1} + n_t     (rows)
        O = b * (Q W) + c * (Q S) - (A * Q X^T) E    for a layer of inputs X and errors E, where the
        queries Q of the second layer are what the first has read, activated
    """
    arguments = (q, k, v, lr, momentum, decay, w1, w2, s1, s2, a1, a2)
    options = (chunk_size, activation, residual, objective, read, norm_eps)
    run = functools.partial(titans_network_chunked, product_dtype=product_dtype)
    if cu_seqlens is not None or len(q) > 1:
        return _each_sequence_of_network(
            run, cu_seqlens, arguments, (norm_weight, norm_bias), position, options
        )
    weights, momenta, anchor, network = _network_state(
        arguments, norm_weight, norm_bias, options, product_dtype
    )
    product, tokens, out_dtype, dtype = network.product, q.shape[1], q.dtype, w1.dtype
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    offset = 0 if position is None or len(q) == 0 else int(position)
    outputs, start = [v[:, :, :0]], 0
    while start < tokens:
        if (offset + start) % chunk_size == 0:
            anchor = weights
        stop = min(tokens, start + chunk_size - (offset + start) % chunk_size)
        here = slice(start, stop)
        rows = _coefficients(
            lr[:, here], *(x if x is None else x[:, here] for x in (momentum, decay))
        )
        b, c, m, a_rows, n_rows = rows
        pairs = network.gradients(anchor, k[:, :, here], v[:, :, here], objective)
        queries = q[:, :, here]
        if read == "chunk":
            out = network.read(anchor, queries)
        else:
            reads = slice(1, None) if read == "after" else slice(None, -1)
            x = queries
            for layer, (keys, errors) in enumerate(pairs):
                scores = a_rows[:, :, reads] * product(x, keys.mT)
                core = b[:, :, reads] * product(x, weights[layer]) - product(scores, errors)
                if momenta is not None:
                    core = core + c[:, :, reads] * product(x, momenta[layer])
                x = network.act(core)
            out = network.output(queries, core, len(weights))
        outputs.append(out)
        before, last = weights, slice(-1, None)
        weights, states = [], []
        for layer, (keys, errors) in enumerate(pairs):

            def learned(rows, keys=keys, errors=errors):
                return product(keys.mT, rows[:, :, -1, :, None] * errors)

            weights.append(b[:, :, last] * before[layer] - learned(a_rows))
            if momenta is not None:
                weights[-1] = weights[-1] + c[:, :, last] * momenta[layer]
                states.append(m[:, :, last] * momenta[layer] - learned(n_rows))
        momenta = states if momenta is not None else None
        start = stop
    if (offset + tokens) % chunk_size == 0:
        anchor = weights
    out = torch.cat(outputs, 2).transpose(1, 2).to(out_dtype)
    return out, *_pairs(weights), *_pairs(momenta), *_pairs(anchor)


def _coefficients(lr, momentum, decay):
    """b, c, m [1, H, 1 + n, 1] and the rows of A and N [1, H, 1 + n, n] over a chunk's n tokens,
    the state before the first token included."""
    size = lr.shape[1]
    zero = torch.zeros_like(lr.transpose(1, 2))  # [1, H, n]
    units = torch.eye(size, dtype=lr.dtype, device=lr.device)
    one, none = torch.ones_like(zero[..., :1]), torch.zeros_like(zero[..., :1])
    states = [(one, none, none if momentum is None else one, zero, zero)]
    for t in range(size):
        b, c, m, a, n = states[-1]
        kept = 1 if decay is None else 1 - decay[:, t, :, None]
        moved = 0 if momentum is None else momentum[:, t, :, None]
        n = moved * n + lr[:, t, :, None] * units[t]
        m = moved * m
        states.append((kept * b, kept * c + m, m, kept * a + n, n))
    return tuple(torch.stack(rows, -2) for rows in zip(*states, strict=True))


def _network_state(arguments, norm_weight, norm_bias, options, product_dtype=None):
    """Weights, momenta (None without), anchor as lists, and the network."""
    *_, momentum, _, w1, w2, s1, s2, a1, a2 = arguments
    _, activation, residual, _, _, norm_eps = options
    weights = [w1] if w2 is None else [w1, w2]
    momenta = None
    if momentum is not None:
        given = [s1, s2][: len(weights)]
        momenta = [
            torch.zeros_like(w) if s is None else s for w, s in zip(weights, given, strict=True)
        ]
    anchor = weights if a1 is None else [a1, a2][: len(weights)]
    norms = [None if x is None else x[:, :, None] for x in (norm_weight, norm_bias)]
    network = Network(activation, residual, *norms, norm_eps)
    if product_dtype is not None:
        network = replace(network, product=lambda a, b: _RoundedProduct.apply(a, b, product_dtype))
    return weights, momenta, anchor, network


def _pairs(matrices):
    return (None, None) if matrices is None else (*matrices, None)[:2]


def _each_sequence_of_network(function, cu_seqlens, arguments, norms, position, options):
    """Runs `function` on each packed sequence, or each row of the batch, alone."""
    inputs, state = arguments[:6], (*arguments[6:], *norms, position)
    rows = len(arguments[6])
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    results = []
    for i in range(rows):
        tokens = [
            None if x is None else x[i : i + 1] if bounds is None
            else x[:, bounds[i] : bounds[i + 1]]
            for x in inputs
        ]  # fmt: skip
        *matrices, at = [None if x is None else x[i : i + 1] for x in state]
        results.append(function(*tokens, *matrices, at, None, *options))
    if not results:
        weights, momenta, anchor, _ = _network_state(arguments, *norms, options)
        out = torch.zeros_like(arguments[2])
        return out, *_pairs(weights), *_pairs(momenta), *_pairs(anchor)
    outputs, *states = zip(*results, strict=True)
    joined = [None if x[0] is None else torch.cat(x) for x in states]
    return torch.cat(outputs, 0 if bounds is None else 1), *joined


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
