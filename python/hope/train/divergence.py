"""What a run says that cannot go on: where the first tensor is that is no number any more."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hope.optim.base import local


class TrainingDiverged(RuntimeError):
    """The loss or its gradient became NaN or infinite; the message says where, and what is left."""


def bad_parameter(model: nn.Module) -> str | None:
    """The first parameter that is not finite, in words; of what this rank has of the model."""
    found = (_bad(f"the parameter {name}", p) for name, p in model.named_parameters())
    return next(filter(None, found), None)


def first_bad_tensor(
    model: nn.Module, backward: Callable[[Callable[..., Tensor]], object]
) -> str | None:
    """The first tensor of a step that is not finite, in words; None where all are.

    backward: computes the step's gradient with the loss function that it is given, which is
    `model.loss`, watched. Looked at in this order: the parameters; the output of every module as it
    ends, so that of nested ones the inner is named; the loss; then, in the order of the backward
    pass, the gradients of those outputs and of the parameters. Where all are finite and the
    gradient's norm is not, its largest entry is named. Leaves no gradient.
    """
    if bad := bad_parameter(model):
        return bad
    found: list[str] = []

    def look(what: str, tensor: Tensor | None) -> None:  # None: a gradient of nothing but zeros
        if not found and tensor is not None and (bad := _bad(what, tensor)):
            found.append(bad)

    def output_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    look(f"the output of {name}", tensor)
                    if tensor.requires_grad:
                        tensor.register_hook(gradient_hook(f"the output of {name}"))

        return hook

    def gradient_hook(name: str) -> Callable[[Tensor | None], None]:
        return lambda gradient: look(f"the gradient of {name}", gradient)

    def loss(*batch: Tensor | None) -> Tensor:
        value = model.loss(*batch)
        look("the loss", value)
        return value

    model.zero_grad()
    handles = [
        *(m.register_forward_hook(output_hook(n or "the model")) for n, m in model.named_modules()),
        *(p.register_hook(gradient_hook(name)) for name, p in model.named_parameters()),
    ]
    try:
        backward(loss)
        return found[0] if found else _overflow(model)
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad()


def _bad(what: str, tensor: Tensor) -> str | None:
    tensor = local(tensor.detach())
    if tensor.isfinite().all():
        return None
    counts = {"NaN": int(tensor.isnan().sum()), "infinite": int(tensor.isinf().sum())}
    counted = " and ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    return f"{what}, of shape {list(tensor.shape)} ({counted} of {tensor.numel()} numbers)"


def _overflow(model: nn.Module) -> str | None:
    """Where the gradient is largest, if squares of its entries have an infinite sum."""
    parameters = model.named_parameters()
    gradients = {name: local(p.grad) for name, p in parameters if p.grad is not None}
    norms = {name: gradient.norm() for name, gradient in gradients.items()}
    if all(norm.isfinite() for norm in norms.values()):
        return None
    name = max(gradients, key=lambda name: gradients[name].abs().max().item())
    largest = gradients[name].abs().max().item()
    return f"the norm of the gradient of {name}, the largest entry of which is {largest:.3g}"
