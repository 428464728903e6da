"""Learning from a text while it is read: a segment at a time, every weight at its own pace."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hope.config import LearnConfig, RunConfig
from hope.errors import HopeError
from hope.layers import MLP, SwiGLU
from hope.model import LanguageModel, ModelState
from hope.optim import MultiFrequency
from hope.train import TrainingDiverged, autocast
from hope.train.divergence import bad_parameter

_SEGMENT = 64  # tokens, where no level says how many


def learn_config(run: RunConfig, **settings: Any) -> LearnConfig:
    """`settings` of a LearnConfig, and what fits the run's model where they say nothing.

    method: "cms" for a model that has one, else "finetune". chunks: the model's own (the fastest
    for nested levels, which are one MLP). segment: the fastest chunk, or 64. context: the length of
    the training's sequences: what a model carries beyond it, it has not been trained for, and with
    softmax attention it grows. Raises HopeError for settings that do not fit the model.
    """
    cms = run.model.cms
    settings = {name: value for name, value in settings.items() if value is not None}
    method = settings.setdefault("method", "finetune" if cms is None else "cms")
    if method == "cms":
        if cms is None:
            raise HopeError(f"method 'cms' needs a model with a CMS, and {run.preset} has none")
        chunks = settings.setdefault("chunks", cms.chunk_sizes[: cms.mlps])
        if len(chunks) != cms.mlps:
            raise HopeError(
                f"chunks must be {cms.mlps} numbers, one for each MLP of the CMS, not {chunks}"
            )
        settings.setdefault("segment", min(chunks))
    config = LearnConfig(**{"segment": _SEGMENT, **settings})
    if "context" in settings:
        return config
    whole = max(1, run.train.sequence // config.segment)
    return replace(config, context=whole * config.segment)


class Learner:
    """A model that learns from a text while it reads it, in segments (equations 70-71).

    The loss of a segment is the mean over its tokens of the next token's negative log-likelihood,
    with the state that the text before it has left. Its gradient g, cut at the segment's start,
    goes to the weights W that the method names; of a level with chunks of C tokens,

        pending <- pending + lr direction(g)        after every segment
        W <- W - pending,   pending <- 0            when C more tokens have been learned from

    where direction is `hope.optim.MultiFrequency`'s rule. With "sgd" that is a level of
    `hope_ext.cms_memory` with the objective "teach", whose error is the loss's gradient at the
    level's output. All other weights stay as they are.

    What a level's MLP has become inside a text by the levels' own objective (`model.cms.updates`)
    is W plus an offset. The offset is carried: W moves below it, also in the middle of a text.

    model: learns in place; only the weights that learn keep `requires_grad`. run: what it was
    trained with. A text is read by a batch of one.
    """

    def __init__(self, model: LanguageModel, run: RunConfig, config: LearnConfig) -> None:
        self.model, self.run, self.config = model.train(), run, config
        model.requires_grad_(False)
        groups = [
            {"params": [w.requires_grad_() for w in weights], "period": period, "lr": rate}
            for weights, period, rate in zip(
                learned_weights(model, config.method),
                config.periods or (1,),
                config.rates,
                strict=True,
            )
        ]
        self.parameters = [w for group in groups for w in group["params"]]
        betas = (run.train.beta1, run.train.beta2)
        options = {"betas": betas, "eps": run.train.eps, "weight_decay": 0.0}
        self.optimizer = MultiFrequency(groups, rule=config.rule, **options)
        self.state: ModelState | None = None  # levels' weights in it are offsets
        self.in_context = 0  # tokens that the state has seen

    def read(self, tokens: Tensor) -> float:
        """The nats of tokens[1:], each after all before it; a whole segment is learned from.

        tokens: 1-D, of which the last is not read; at most a segment and one. What is shorter is
        read, not learned. Raises TrainingDiverged for a loss or gradient that is not finite.
        """
        count, segment = len(tokens) - 1, self.config.segment
        if not 0 < count <= segment:
            raise ValueError(f"tokens must be 2 to {segment + 1}, not {len(tokens)}")
        if self.config.context and self.in_context + count > self.config.context:
            self.restart()
        tokens = tokens.to(self.model.embedding.weight.device).long()[None]
        learns = count == segment
        with autocast(tokens.device, self.run.train), torch.set_grad_enabled(learns):
            logits, state = self.model(tokens[:, :-1], self._moved(1), return_state=True)
            loss = F.cross_entropy(logits[0], tokens[0, 1:])
        norm = 0.0
        if learns:
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip).item()
        nats = loss.item()
        if not (math.isfinite(nats) and math.isfinite(norm)):
            where = bad_parameter(self.model) or "all parameters are finite"
            raise TrainingDiverged(
                f"learning diverged (loss {nats}, gradient norm {norm}): {where}; a lower lr, or a "
                "context after which the state starts anew, usually helps"
            )
        self.state = state.detach()
        self.state = self._moved(-1)
        self.in_context += count
        if learns:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return nats * count

    def restart(self) -> None:
        """The next token is the first of a text: the state starts anew; what is pending stays."""
        self.state, self.in_context = None, 0

    def _moved(self, sign: int) -> ModelState | None:
        """The state with levels' weights that are their offsets plus W (1), or minus W (-1).

        Only in the first is W part of the graph.
        """
        if self.state is None or not any(self.state.cms):
            return self.state
        cms = []
        for block, states in zip(self.model.blocks, self.state.cms, strict=True):
            levels = block.cms.levels
            starts = [levels[i % len(levels)].matrices() for i in range(len(states))]
            cms.append(
                tuple(
                    replace(state, weights=_sum(state.weights, start, sign))
                    for state, start in zip(states, starts, strict=True)
                )
            )
        return replace(self.state, cms=tuple(cms))

    def state_dict(self) -> dict[str, Any]:
        """Moments, pending gradients and the carried state, as tensors and plain values."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "in_context": self.in_context,
            "state": None if self.state is None else pytree.tree_leaves(self.state),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What state_dict gave. Another model's raises what comes first of KeyError, TypeError,
        ValueError, AttributeError and RuntimeError."""
        self.optimizer.load_state_dict(state["optimizer"])
        for weight, entries in self.optimizer.state.items():  # which torch does not look at
            for name, value in entries.items():
                if isinstance(value, Tensor) and value.dim() and value.shape != weight.shape:
                    shapes = f"{[*value.shape]}, and its weight {[*weight.shape]}"
                    raise ValueError(f"{name} has the shape {shapes}")
        self.in_context, self.state = state["in_context"], None
        if state["state"] is not None:
            device = self.model.embedding.weight.device
            with torch.no_grad():  # what a state of this model looks like
                token = torch.zeros(1, 1, dtype=torch.int64, device=device)
                _, like = self.model(token, return_state=True)
            leaves = [x.to(device) if isinstance(x, Tensor) else x for x in state["state"]]
            ranks, expected = ([_rank(x) for x in xs] for xs in (leaves, pytree.tree_leaves(like)))
            if ranks != expected:  # (of attention's keys the sizes grow)
                raise ValueError("what it carries is another model's")
            self.state = pytree.tree_unflatten(leaves, pytree.tree_structure(like))
            with torch.no_grad(), autocast(device, self.run.train):  # if its sizes fit, it is read
                self.model(token, self._moved(1), return_state=True)


def learned_weights(model: LanguageModel, method: str) -> list[list[nn.Parameter]]:
    """The weights that learn by a method, those of one pace together.

    "cms": the matrices of each level, of all blocks, from the fastest level to the slowest.
    """
    if method == "finetune":
        return [list(model.parameters())]
    if method == "mlp":
        mlps = [module for module in model.modules() if isinstance(module, (MLP, SwiGLU))]
        return [[w for mlp in mlps for w in mlp.parameters()]]
    paces = range(model.config.cms.mlps)
    return [
        [w for block in model.blocks for w in block.cms.levels[i].mlp.parameters()] for i in paces
    ]


def _rank(leaf: object) -> int | None:
    return leaf.dim() if isinstance(leaf, Tensor) else None


def _sum(weights: Sequence[Tensor], start: Sequence[Tensor], sign: int) -> tuple[Tensor, Tensor]:
    start = start if sign > 0 else [w.detach() for w in start]
    first, second = (w + sign * s for w, s in zip(weights, start, strict=True))
    return first, second
