"""HOPE's self-modifying Titans (Nested Learning, arXiv 2512.24695, eqs. 83-97): five memories that
generate their own keys, values, learning rates and retention, and learn by their own rule.

Legend: B batch (or packed sequences N), T tokens, H heads, D head dim, F hidden dim of a memory.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

NAMES = ("k", "v", "lr", "retention", "memory")  # the order in lists of matrices
GATES = ("lr", "retention")  # these map D to 1, without the residual
SMALLEST_NORM = 1e-6  # of a key before it is normalised

Memory = Sequence[Tensor]  # (W,) or (W1, W2), each [B, H, ., .]
Memories = dict[str, Memory]


@dataclass(frozen=True)
class Rules:
    """What the memories compute, and what they learn from.

    M(x) = x @ W, or act(x @ W1) @ W2, to which k, v and memory add x.
    """

    lr_max: float
    activation: str  # "gelu" (its tanh approximation) or "silu"
    objective: str  # "l2" or "dot"
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul

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

    def output(self, name: str, x: Tensor, core: Tensor, layers: int) -> Tensor:
        return x + core if layers == 2 and name not in GATES else core

    def read(self, name: str, memory: Memory, x: Tensor) -> Tensor:
        """M(x), x [B, H, n, D]."""
        core = self.product(x, memory[0])
        if len(memory) == 2:
            core = self.product(self.act(core), memory[1])
        return self.output(name, x, core, len(memory))

    def generate(
        self, anchor: Memories, x: Tensor, lr_bias: Tensor, retention_bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """k, v [B, H, n, D] and eta, alpha [B, H, n, 1] of the tokens x; biases [B, H]."""
        k, v, lr, retention = (self.read(name, anchor[name], x) for name in NAMES[:4])
        eta = self.lr_max * (lr + lr_bias[:, :, None, None]).sigmoid()
        alpha = (retention + retention_bias[:, :, None, None]).sigmoid()
        return F.normalize(k, dim=-1, eps=SMALLEST_NORM), v, eta, alpha

    def gradients(
        self, name: str, memory: Memory, k: Tensor, value: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """(input, error) [B, H, n, .] of each layer: a token's gradient is input^T error."""
        inputs, core = [k], self.product(k, memory[0])
        if len(memory) == 2:
            z = core
            inputs.append(self.act(z))
            core = self.product(inputs[1], memory[1])
        l2 = self.objective == "l2"
        errors = [self.output(name, k, core, len(memory)) - value if l2 else -value]
        if len(memory) == 2:
            errors.insert(0, self.product(errors[0], memory[1].mT) * self.slope(z))
        return list(zip(inputs, errors, strict=True))

    def lessons(
        self, anchor: Memories, k: Tensor, v: Tensor
    ) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """The gradients of all memories, each towards its own value M(v)."""
        return {
            name: self.gradients(name, memory, k, self.read(name, memory, v))
            for name, memory in anchor.items()
        }


def selfmod(
    x: Tensor,  # [B, T, H, D]
    q: Tensor,  # [B, T, H, D]
    weights: Sequence[Tensor],  # of NAMES in turn, W or W1, W2: [B, H, D, .], [B, H, F, .]
    lr_bias: Tensor,  # [B, H]
    retention_bias: Tensor,  # [B, H]
    anchor: Sequence[Tensor],  # like weights; empty: the call starts at a chunk boundary
    position: Tensor | None,  # [B]; None: zeros
    cu_seqlens: Tensor | None,  # [N + 1]; then B of x is 1 and the state's rows are the N sequences
    chunk_size: int,
    lr_max: float,
    activation: str,
    objective: str,
    read: str,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Token by token, with everything that is generated and all gradients taken at the anchor a:

    k_t = M_k^a(x_t) / max(|M_k^a(x_t)|, 1e-6)           v_t = M_v^a(x_t)
    eta_t = lr_max sigmoid(M_lr^a(x_t) + lr_bias)        alpha_t = sigmoid(M_retention^a(x_t) + ...)
    grad: of 1/2 |M^a(k_t) - M^a(v_t)|^2 (l2), of -<M^a(k_t), M^a(v_t)> (dot), M^a(v_t) a constant
    first layer    W <- (alpha_t I - eta_t k_t^T k_t) W - eta_t grad
    second layer   W <- alpha_t W - eta_t grad
    o_t = M_memory(q_t) before this token's update | after it | at the anchor (chunk)

    Returns o [B, T, H, D] and the final weights and anchor.
    """
    options = (chunk_size, lr_max, activation, objective, read)
    if cu_seqlens is not None:
        return _each_sequence(
            selfmod, x, q, weights, lr_bias, retention_bias, anchor, position, cu_seqlens, options
        )
    rules, memories = Rules(lr_max, activation, objective), _named(weights)
    at_start, tokens, out_dtype = _named(anchor or weights), x.shape[1], q.dtype
    x, q = (y.to(weights[0].dtype).transpose(1, 2) for y in (x, q))  # [B, H, T, D]
    if position is None:
        position = torch.zeros(len(x), dtype=torch.int64, device=x.device)

    def at_anchor(step: int) -> Memories:  # the weights, in rows where `step` tokens end a chunk
        boundary = ((position + step) % chunk_size == 0)[:, None, None, None]
        return {
            name: [
                torch.where(boundary, w, a)
                for w, a in zip(memories[name], at_start[name], strict=True)
            ]
            for name in NAMES
        }

    outputs = [q[:, :, :0]]
    for t in range(tokens):
        here, at_start, before = slice(t, t + 1), at_anchor(t), memories["memory"]
        k, v, eta, alpha = rules.generate(at_start, x[:, :, here], lr_bias, retention_bias)
        lessons, learned = rules.lessons(at_start, k, v), {}
        for name, layers in memories.items():
            gradients = [y.mT @ error for y, error in lessons[name]]
            gradients[0] = gradients[0] + k.mT @ (k @ layers[0])
            learned[name] = [
                alpha * w - eta * gradient for w, gradient in zip(layers, gradients, strict=True)
            ]
        memories = learned
        source = {
            "after": memories["memory"], "before": before, "chunk": at_start["memory"]
        }[read]  # fmt: skip
        outputs.append(rules.read("memory", source, q[:, :, here]))
    out = torch.cat(outputs, 2).transpose(1, 2).to(out_dtype)
    return out, _flat(memories), _flat(at_anchor(tokens))


def selfmod_chunked(
    x, q, weights, lr_bias, retention_bias, anchor, position, cu_seqlens,
    chunk_size, lr_max, activation, objective, read,
    product_dtype: torch.dtype | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """The same by chunks, with the operands of every product rounded to `product_dtype`: the
    accuracy that a tensor-core kernel of that dtype can have, so the tests' yardstick.

        A_t = alpha_t A_{t-1} + eta_t 1_t (rows; A_{-1} = 0)       b_t = alpha_t b_{t-1}, b_{-1} = 1
        first layer    L[t,s] = <k_t, k_s> A_{t-1}[s],  (I + L) U = b_{t-1} * (K W) + G
                       W' = b_last W - K^T (A_last * U)            the delta rule's errors U
        second layer   W' = b_last W - H^T (A_last * E)
        read           core = b * (Q W) - (A * Q X^T) E for a layer of inputs X, errors E (or U)
    """
    options = (chunk_size, lr_max, activation, objective, read)
    if cu_seqlens is not None or len(x) > 1:
        run = functools.partial(selfmod_chunked, product_dtype=product_dtype)
        return _each_sequence(
            run, x, q, weights, lr_bias, retention_bias, anchor, position, cu_seqlens, options
        )

    def product(a: Tensor, b: Tensor) -> Tensor:
        return _RoundedProduct.apply(a, b, product_dtype)

    rules, memories = Rules(lr_max, activation, objective, product), _named(weights)
    at_start, tokens, out_dtype = _named(anchor or weights), x.shape[1], q.dtype
    x, q = (y.to(weights[0].dtype).transpose(1, 2) for y in (x, q))
    offset = 0 if position is None or len(x) == 0 else int(position)
    outputs, start = [q[:, :, :0]], 0
    while start < tokens:
        if (offset + start) % chunk_size == 0:
            at_start = memories
        stop = min(tokens, start + chunk_size - (offset + start) % chunk_size)
        k, v, eta, alpha = rules.generate(at_start, x[:, :, start:stop], lr_bias, retention_bias)
        b, a_rows = _coefficients(eta, alpha)
        size = stop - start
        system = product(k, k.mT) * a_rows[:, :, :-1] + torch.eye(size, dtype=k.dtype).to(k)
        lessons = rules.lessons(at_start, k, v)
        for name, layers in memories.items():
            target = b[:, :, :-1] * product(k, layers[0]) + lessons[name][0][1]
            errors = torch.linalg.solve_triangular(system, target, upper=False, unitriangular=True)
            lessons[name][0] = (k, errors)
        queries = q[:, :, start:stop]
        if read == "chunk":
            out = rules.read("memory", at_start["memory"], queries)
        else:
            reads = slice(1, None) if read == "after" else slice(None, -1)
            y = queries
            for w, (keys, errors) in zip(memories["memory"], lessons["memory"], strict=True):
                scores = a_rows[:, :, reads] * product(y, keys.mT)
                core = b[:, :, reads] * product(y, w) - product(scores, errors)
                y = rules.act(core)
            out = rules.output("memory", queries, core, len(memories["memory"]))
        outputs.append(out)
        last = a_rows[:, :, -1, :, None]
        memories = {
            name: [
                b[:, :, -1:] * w - product(keys.mT, last * errors)
                for w, (keys, errors) in zip(layers, lessons[name], strict=True)
            ]
            for name, layers in memories.items()
        }
        start = stop
    if (offset + tokens) % chunk_size == 0:
        at_start = memories
    out = torch.cat(outputs, 2).transpose(1, 2).to(out_dtype)
    return out, _flat(memories), _flat(at_start)


def _coefficients(eta: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """b [1, H, 1 + n, 1] and the rows of A [1, H, 1 + n, n], the state before the first token
    included; eta, alpha [1, H, n, 1]."""
    units = torch.eye(eta.shape[2], dtype=eta.dtype, device=eta.device)
    states = [(torch.ones_like(eta[:, :, 0]), torch.zeros_like(eta[..., 0]))]
    for t in range(eta.shape[2]):
        b, a = states[-1]
        states.append((alpha[:, :, t] * b, alpha[:, :, t] * a + eta[:, :, t] * units[t]))
    b, a = (torch.stack(rows, 2) for rows in zip(*states, strict=True))
    return b, a


def _named(matrices: Sequence[Tensor]) -> Memories:
    layers = len(matrices) // len(NAMES)
    return {name: matrices[i * layers : (i + 1) * layers] for i, name in enumerate(NAMES)}


def _flat(memories: Memories) -> list[Tensor]:
    return [matrix for memory in memories.values() for matrix in memory]


def _each_sequence(
    function, x, q, weights, lr_bias, retention_bias, anchor, position, cu_seqlens, options
):
    """Runs `function` on each packed sequence, or each row of the batch, alone."""
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    results = []
    for i in range(len(weights[0])):
        row = slice(i, i + 1)
        x_i, q_i = (y[row] if bounds is None else y[:, bounds[i] : bounds[i + 1]] for y in (x, q))
        results.append(
            function(
                x_i, q_i, [w[row] for w in weights], lr_bias[row], retention_bias[row],
                [a[row] for a in anchor], None if position is None else position[row], None,
                *options,
            )
        )  # fmt: skip
    if not results:
        return torch.zeros_like(q), list(weights), list(anchor or weights)
    outputs, *states = zip(*results, strict=True)
    joined = [[torch.cat(rows) for rows in zip(*state, strict=True)] for state in states]
    return torch.cat(outputs, 0 if bounds is None else 1), *joined


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
