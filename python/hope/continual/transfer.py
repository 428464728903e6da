"""What learning in sequence has cost and brought, from a matrix of losses.

R[i][j] is the loss on held-out text of domain j after learning domain i, R[0] after the training on
domain 0; T domains, the last is T - 1. The figures are those of Lopez-Paz and Ranzato (Gradient
Episodic Memory, arXiv 1706.08840, section 3), which are differences of accuracies, and of Chaudhry
and others (arXiv 1801.10112) for forgetting, with the sign turned where a loss is better when it is
lower: a *positive* transfer is good, a *positive* forgetting is bad. All in the losses' unit.
"""

from collections.abc import Sequence

Matrix = Sequence[Sequence[float]]


def average_loss(losses: Matrix) -> float:
    """The mean over all domains at the end: the paper's ACC, of losses."""
    return _mean(losses[-1])


def backward_transfer(losses: Matrix) -> float:
    """The mean of R[j][j] - R[T-1][j] over j < T - 1: what later domains did for earlier ones."""
    return _mean([losses[j][j] - losses[-1][j] for j in range(len(losses) - 1)])


def forward_transfer(losses: Matrix) -> float:
    """The mean of R[0][j] - R[j-1][j] over j > 1: what earlier domains did for later ones.

    The paper compares with a model that has learned nothing. Of language models that tells only
    that bytes are not random; so the start of the sequence is taken, R[0], where domain 1 has had
    nothing before it yet. With two domains it is 0.
    """
    return _mean([losses[0][j] - losses[j - 1][j] for j in range(2, len(losses))])


def forgetting(losses: Matrix) -> float:
    """The mean over j < T - 1 of R[T-1][j] less the lowest loss since domain j was learned."""
    last = len(losses) - 1
    return _mean(
        [losses[-1][j] - min(losses[i][j] for i in range(j, last + 1)) for j in range(last)]
    )


def learned(losses: Matrix) -> float:
    """The mean of R[j-1][j] - R[j][j] over j > 0: what a domain's own text has brought."""
    return _mean([losses[j - 1][j] - losses[j][j] for j in range(1, len(losses))])


FIGURES = {
    "average_loss": average_loss,
    "learned": learned,
    "forgetting": forgetting,
    "backward_transfer": backward_transfer,
    "forward_transfer": forward_transfer,
}


def figures(losses: Matrix) -> dict[str, float]:
    """All of them by name; losses [T][T], T >= 2."""
    return {name: figure(losses) for name, figure in FIGURES.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
