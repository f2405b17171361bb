"""The networks that MAPPO trains: a shared actor, a critic, and the policy that a trained actor
becomes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from prunevit.envs.observations import Rows, View, field_size
from prunevit.envs.vit.staged_vit import StagedViT

HIDDEN_GAIN = math.sqrt(2)
POLICY_GAIN = 0.01  # MAPPO: a first policy that is nearly uniform
PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)  # their roots are irrational
PRIOR_FLOOR = 1e-3  # class attention times N below which the prior falls no further


def orthogonal(layer: nn.Linear, gain: float) -> nn.Linear:
    """Orthogonal weights, zero bias."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(inputs: int, hidden: Sequence[int], outputs: int, output_gain: float) -> list[nn.Module]:
    """Linear layers with GELU between them."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [orthogonal(nn.Linear(inputs, width), HIDDEN_GAIN), nn.GELU()]
        inputs = width
    return [*layers, orthogonal(nn.Linear(inputs, outputs), output_gain)]


class Actor(nn.Module):
    """Observations [R, D_obs] -> logits of the actions [R, A]; one network for all agents, with
    LayerNorm on its input.
    """

    def __init__(self, observation_size: int, num_actions: int, hidden: Sequence[int]) -> None:
        super().__init__()
        layers = mlp(observation_size, hidden, num_actions, POLICY_GAIN)
        self.net = nn.Sequential(nn.LayerNorm(observation_size), *layers)

    def forward(self, observation: Tensor) -> Tensor:
        return self.net(observation)


class TokenActor(Actor):
    """An actor for keep and prune that starts from a prior: log(class attention * N) is added to
    the logit of keep, and so is the logarithm of the price of compute, where it is observed.

    The weights of both and a bias are learned. They learn faster than the network's weights would
    move them, so each is kept as a product with ``PRIOR_SPEED``.

    Args:
        observation_size: D_obs.
        hidden: widths of the hidden layers.
        attention: where ``cls_attention`` stands in the observation; None for no prior.
        prior_weight: the weight that learning starts from.
        keep_bias: added to the logit of keep at the start; a positive one starts by pruning little.
        alpha: where ``alpha`` stands in the observation; None where it doesn't.
    """

    PRIOR_SPEED = 10.0

    def __init__(
        self,
        observation_size: int,
        hidden: Sequence[int],
        attention: int | None,
        prior_weight: float = 1.0,
        keep_bias: float = 0.0,
        alpha: int | None = None,
    ) -> None:
        super().__init__(observation_size, 2, hidden)
        self.hidden = tuple(hidden)
        self.attention = attention
        self.alpha = alpha
        self.keep_bias = nn.Parameter(torch.tensor(keep_bias / self.PRIOR_SPEED))
        self.prior_weight = nn.Parameter(
            torch.tensor(prior_weight / self.PRIOR_SPEED), requires_grad=attention is not None
        )
        # only those that observe a price have its weight: older weights stay readable
        if alpha is not None:
            self.alpha_weight = nn.Parameter(torch.zeros(()))

    def forward(self, observation: Tensor) -> Tensor:
        prior = None if self.attention is None else observation[:, self.attention]
        alpha = None if self.alpha is None else observation[:, self.alpha]
        return self._with_prior(self.net(observation), prior, alpha)

    def _with_prior(self, logits: Tensor, attention: Tensor | None, alpha: Tensor | None) -> Tensor:
        prune, keep = logits.unbind(-1)
        keep = keep + self.keep_bias * self.PRIOR_SPEED
        if attention is not None:
            prior = attention.clamp(min=PRIOR_FLOOR).log()
            keep = keep + self.prior_weight * self.PRIOR_SPEED * prior
        if alpha is not None:
            keep = keep + self.alpha_weight * self.PRIOR_SPEED * alpha
        return torch.stack([prune, keep], dim=-1)

    def margins(self, rows: Rows) -> Tensor:
        """How much likelier keep is than prune: the difference of ``forward``'s logits on the
        concatenated fields, which are never concatenated.

        LayerNorm and a linear layer after it are linear in the fields, but for each row's mean and
        spread, and those are sums over the fields: what all rows of an image share (its class
        token, the stage) is multiplied once an image.

        Returns:
            [S], of the rows.
        """
        norm, first, last = self.net[0], self.net[1], self.net[-1]
        assert isinstance(norm, nn.LayerNorm)
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        weight = first.weight * norm.weight
        columns = torch.cat([weight, torch.ones_like(weight[:1])]).T  # the last output is the sum
        size = len(columns)
        total, squares = columns.new_zeros(1, columns.shape[1]), columns.new_zeros(1, 1)
        for field in rows.fields:
            if not field.of_rows:
                total = total + field.values @ columns[field.columns]
                squares = squares + _squared_norm(field.values)
        if len(total) > 1:
            image = rows.layout.image
            total, squares = total.index_select(0, image), squares.index_select(0, image)
        for field in rows.fields:
            if field.of_rows:
                total = torch.addmm(total, field.values, columns[field.columns])
                squares = squares + _squared_norm(field.values)
        projected, mean = total[:, :-1], total[:, -1:] / size
        spread = (squares / size - mean.square()).clamp(min=0).add(norm.eps).rsqrt()
        centred = torch.addcmul(projected, mean, weight.sum(1), value=-1)
        bias = torch.addmv(first.bias, first.weight, norm.bias)
        normed = torch.addcmul(bias, centred, spread)
        constant = self.keep_bias * self.PRIOR_SPEED
        if last is first:  # without hidden layers these are the logits
            margin = normed[:, 1] - normed[:, 0] + constant
        else:
            hidden = self.net[2:-1](normed)
            constant = last.bias[1] - last.bias[0] + constant
            margin = hidden @ (last.weight[1] - last.weight[0]) + constant
        if self.attention is not None:
            prior = rows.column(self.attention).clamp(min=PRIOR_FLOOR).log()
            margin = torch.addcmul(margin, prior, self.prior_weight, value=self.PRIOR_SPEED)
        if self.alpha is not None:
            price = rows.column(self.alpha)
            margin = torch.addcmul(margin, price, self.alpha_weight, value=self.PRIOR_SPEED)
        return margin.expand(int(rows.layout.lengths.sum()))


def _squared_norm(values: Tensor) -> Tensor:
    """[R, size] -> [R, 1]."""
    return torch.linalg.vector_norm(values, dim=1, keepdim=True).square()


class Critic(nn.Module):
    """What an agent can expect: [R, D] -> [R]; D is its observation and, if central, the state
    behind it.

    Without the LayerNorm that MAPPO's authors put on its input: where the state is a world's
    coordinates (mpe2's ``simple_reference_v3``), values learned behind it came so late that two of
    five policies got worse than random.
    """

    def __init__(self, inputs: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.net = nn.Sequential(*mlp(inputs, hidden, 1, 1.0))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs).squeeze(-1)


@cache
def dither_levels(height: int, width: int, stage: int, device: torch.device) -> Tensor:
    """Levels between 0 and 1, each once, for the patches of a grid: every neighbourhood has low and
    high ones, and which a patch has at one stage says nothing of the next.

    The ranks of a Kronecker sequence over rows and columns (Roberts 2018, "The unreasonable
    effectiveness of quasirandom sequences"), with irrational steps of its own for each stage.

    Returns:
        float32 [height * width], row by row.
    """
    down, right = (math.sqrt(PRIMES[(2 * stage + i) % len(PRIMES)]) for i in range(2))
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float64),
        torch.arange(width, dtype=torch.float64),
        indexing="ij",
    )
    phase = (rows * down + columns * right).frac().flatten()
    return ((phase.argsort().argsort().float() + 0.5) / len(phase)).to(device)


class LearnedPolicy(nn.Module):
    """A trained actor as a ``Policy``: keeps a patch whose probability of keep is high enough.

    Args:
        actor: observations [R, D_obs] -> logits [R, 2].
        fields: what the actor observes.
        num_prefix: prefix tokens of the backbone it was made for; None where that is not known.
        alpha: price of compute that it is to act under, where the actor observes one; the higher,
            the fewer patches stay. Can be set anew at any time.
        threshold: probability of keep above which a patch stays; 0.5 keeps it where that is the
            likelier action. Can be set anew at any time.
        dither: let the threshold vary from patch to patch and stage to stage, as much as a draw
            would, in a pattern that neighbours share out evenly. Alike patches, which one threshold
            keeps or prunes all together, then stay in the share that their probability says, spread
            over the image; the same ones each time. Can be set anew at any time.

    Raises:
        ValueError: a price that is not positive, none for an actor that observes one, or one for an
            actor that doesn't; a threshold that is no probability.
    """

    def __init__(
        self,
        actor: nn.Module,
        fields: Sequence[str],
        num_prefix: int | None = None,
        alpha: float | None = None,
        threshold: float = 0.5,
        dither: bool = False,
    ) -> None:
        super().__init__()
        self.actor = actor
        self.dither = dither
        self.fields = tuple(fields)
        self.num_prefix = num_prefix
        self.needs_attention = "cls_attention" in self.fields
        self.macs_per_decision = sum(
            layer.weight.numel() for layer in actor.modules() if isinstance(layer, nn.Linear)
        )

        self.alpha = alpha
        self.threshold = threshold

    @property
    def threshold(self) -> float:
        return self._threshold

    @threshold.setter
    def threshold(self, probability: float) -> None:
        if not 0 < probability < 1:
            raise ValueError(f"threshold={probability}: a probability between 0 and 1")
        self._threshold = probability

    @property
    def alpha(self) -> float | None:
        return self._alpha

    @alpha.setter
    def alpha(self, price: float | None) -> None:
        if "alpha" not in self.fields:
            if price is not None:
                raise ValueError(
                    f"alpha={price}: the policy was trained for one price of compute, it observes "
                    f"{', '.join(self.fields)}"
                )
        elif price is None or not 0 < price < math.inf:
            raise ValueError(f"alpha={price}: the policy needs a positive price of compute")
        self._alpha = price

    def check_fits(self, backbone: StagedViT) -> None:
        """Raises ValueError where ``backbone`` shows agents more or less than the actor reads, or
        has other prefix tokens than the one that it was made for.
        """
        if self.num_prefix not in (None, backbone.num_prefix):
            raise ValueError(
                f"the policy was made for a backbone with {self.num_prefix} prefix tokens, "
                f"this one has {backbone.num_prefix}"
            )
        shown = {name: field_size(backbone, name) for name in self.fields}
        first = next(layer for layer in self.actor.modules() if isinstance(layer, nn.Linear))
        if first.in_features != sum(shown.values()):
            raise ValueError(
                f"the policy reads {first.in_features} numbers an agent, the backbone of width "
                f"{backbone.width} with {backbone.num_stages} stages shows {sum(shown.values())}: "
                f"{shown}"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedPolicy:
        """Moves with the backbone, but stays in float32: it is tiny, and rounding moves its
        decisions.
        """
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def under_own_alpha(self, view: View) -> View:
        """``view`` as the policy sees it: under its own price of compute, where it has one."""
        return view if self.alpha is None else view.at_alpha(self.alpha)

    def forward(self, view: View) -> Tensor:
        view = self.under_own_alpha(view)
        rows = view.rows(self.fields) if isinstance(self.actor, TokenActor) else None
        if rows is None:
            logits = self.logits(view)
            margin = logits[:, 1] - logits[:, 0]
        else:
            assert isinstance(self.actor, TokenActor)
            margin = self.actor.margins(rows)
        # a sum is finite only where all its terms are, and asks the device but once
        if not math.isfinite(margin.sum()):
            raise ValueError("the policy's logits are not finite: check its weights and the images")
        return self.keep(view, view.scatter(margin) if rows is None else view.at_patches(margin))

    def keep(self, view: View, margin: Tensor) -> Tensor:
        """Who stays by how much likelier keep is than prune: float [B, N], read where a patch
        lives, -> bool [B, N].
        """
        if self.dither:
            height, width = view.backbone.grid_size
            margin = margin - dither_levels(height, width, view.stage, margin.device).logit()
        return (margin > math.log(self.threshold / (1 - self.threshold))) & view.alive

    def logits(self, view: View) -> Tensor:
        """The actor's logits for the living patches, [R, 2]."""
        return self.actor(view.living(self.fields))
