"""The networks that MAPPO trains: a shared actor and a critic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunevit.envs.fields import Rows
from prunevit.envs.vit.untouched import has_own_hooks, is_untouched

HiddenLayers = Literal["gelu", "relu-norm"]

HIDDEN_GAIN = math.sqrt(2)
POLICY_GAIN = 0.01  # as in MAPPO: the initial policy is nearly uniform
PRIOR_FLOOR = 1e-3  # lower bound of class attention times N in the prior


def orthogonal(layer: nn.Linear, gain: float) -> nn.Linear:
    """Initialises ``layer`` with orthogonal weights and zero bias; returns it."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(
    inputs: int,
    hidden: Sequence[int],
    outputs: int,
    output_gain: float,
    hidden_layers: HiddenLayers = "gelu",
) -> list[nn.Module]:
    """Builds linear layers with GELU, or with ReLU and a LayerNorm, between them."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers.append(orthogonal(nn.Linear(inputs, width), HIDDEN_GAIN))
        layers += [nn.GELU()] if hidden_layers == "gelu" else [nn.ReLU(), nn.LayerNorm(width)]
        inputs = width
    return [*layers, orthogonal(nn.Linear(inputs, outputs), output_gain)]


class Actor(nn.Module):
    """An actor that all agents share: observations [R, D_obs] -> logits of actions [R, A].

    Args:
        observation_size: D_obs.
        num_actions: A.
        hidden: widths of the hidden layers. The input has a LayerNorm.
        hidden_layers: what follows each of them: GELU, or ReLU and a LayerNorm.
    """

    def __init__(
        self,
        observation_size: int,
        num_actions: int,
        hidden: Sequence[int],
        hidden_layers: HiddenLayers = "gelu",
    ) -> None:
        super().__init__()
        layers = mlp(observation_size, hidden, num_actions, POLICY_GAIN, hidden_layers)
        self.net = nn.Sequential(nn.LayerNorm(observation_size), *layers)

    def forward(self, observation: Tensor) -> Tensor:
        return self.net(observation)


class TokenActor(Actor):
    """An actor that chooses between prune (0) and keep (1), with a prior from class attention and
    from redundancy.

    To the logit of keep it adds log(class attention * N), 1 - redundancy and, if alpha is observed,
    log(alpha), with learned weights, and a learned bias. These parameters are stored divided by
    ``PRIOR_SPEED``, so that they learn faster than the weights of the network.

    Args:
        observation_size: D_obs.
        hidden: widths of the hidden layers.
        attention: column of ``cls_attention`` in the observation; None for no prior.
        prior_weight: initial weight of the prior.
        keep_bias: initial bias of keep. A positive one prunes little at the start.
        alpha: column of ``alpha`` in the observation; None if it is not observed.
        redundancy: column of ``redundancy`` in the observation; None for no prior from it.
        redundancy_weight: initial weight of that prior.
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
        redundancy: int | None = None,
        redundancy_weight: float = 0.0,
    ) -> None:
        super().__init__(observation_size, 2, hidden)
        self.hidden = tuple(hidden)
        self.attention = attention
        self.alpha = alpha
        self.redundancy = redundancy
        self.keep_bias = nn.Parameter(torch.tensor(keep_bias / self.PRIOR_SPEED))
        self.prior_weight = nn.Parameter(
            torch.tensor(prior_weight / self.PRIOR_SPEED), requires_grad=attention is not None
        )
        # only actors that read them have these weights, so older files stay readable
        if alpha is not None:
            self.alpha_weight = nn.Parameter(torch.zeros(()))
        if redundancy is not None:
            self.redundancy_weight = nn.Parameter(
                torch.tensor(redundancy_weight / self.PRIOR_SPEED)
            )

    def forward(self, observation: Tensor) -> Tensor:
        return self.with_prior(self.net(observation), observation)

    def with_prior(self, logits: Tensor, observation: Tensor) -> Tensor:
        """Adds prior, bias and alpha to the network's logits, [R, 2]."""
        prune, keep = logits.unbind(-1)
        keep = keep + self.keep_bias * self.PRIOR_SPEED
        if self.attention is not None:
            prior = observation[:, self.attention].clamp(min=PRIOR_FLOOR).log()
            keep = keep + self.prior_weight * self.PRIOR_SPEED * prior
        if self.redundancy is not None:
            distinct = 1 - observation[:, self.redundancy]
            keep = keep + self.redundancy_weight * self.PRIOR_SPEED * distinct
        if self.alpha is not None:
            keep = keep + self.alpha_weight * self.PRIOR_SPEED * observation[:, self.alpha]
        return torch.stack([prune, keep], dim=-1)

    def is_untouched(self) -> bool:
        """Whether ``margins`` gives what ``forward`` gives: nobody added or replaced anything."""
        parts = (self, self.net)
        if any(has_own_hooks(part) or "forward" in vars(part) for part in parts):
            return False
        return type(self).forward is TokenActor.forward and all(map(is_untouched, self.net))

    def margins(self, rows: Rows) -> Tensor:
        """The logit of keep minus that of prune for packed rows, [S].

        It equals that of ``forward`` on the concatenated fields, without concatenating them. Apart
        from each row's mean and standard deviation, which are sums over the fields, LayerNorm and
        the linear layer after it are linear in the fields. So fields that all rows of an image
        share, such as its class token and the stage, are multiplied once per image.
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
            alpha = rows.column(self.alpha)
            margin = torch.addcmul(margin, alpha, self.alpha_weight, value=self.PRIOR_SPEED)
        return margin.expand(int(rows.layout.lengths.sum()))


class AgentAttention(nn.Module):
    """Attention among the living agents of an image, added to the features of each.

    The output layer begins at zero, so that at first nothing is added.

    Args:
        width: W, the number of features.
        heads: number of heads, of ``HEAD_WIDTH`` queries, keys and values each.

    Raises:
        ValueError: there is no head.
    """

    HEAD_WIDTH = 8

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if heads < 1:
            raise ValueError(f"an attention among agents of {heads} heads: it needs at least one")
        self.heads = heads
        inner = heads * self.HEAD_WIDTH
        self.norm = nn.LayerNorm(width)
        self.qkv = orthogonal(nn.Linear(width, 3 * inner), 1.0)
        self.output = nn.Linear(inner, width)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.macs_per_pair = 2 * inner  # scores, and the values that they weigh

    def forward(self, features: Tensor, image: Tensor | None) -> Tensor:
        """Lets agents attend to those of the same image, [R, W] -> [R, W].

        Args:
            features: of each agent, [R, W].
            image: a number for each agent, int64 [R]. Agents of an image have the same and follow
                each other. None if all are of one image.
        """
        qkv, cell, valid = self.qkv(self.norm(features)), None, None
        if image is None:
            padded = qkv[None]
        elif not len(image):
            return features
        else:
            _, index, count = image.unique_consecutive(return_inverse=True, return_counts=True)
            longest = int(count.max())
            padded = qkv
            if len(count) * longest > len(image):  # images of different numbers of agents
                place = torch.arange(len(image), device=image.device)
                cell = index * longest + place - (count.cumsum(0) - count).index_select(0, index)
                padded = qkv.new_zeros(len(count) * longest, qkv.shape[1]).index_copy(0, cell, qkv)
                valid = (torch.arange(longest, device=image.device) < count[:, None])[:, None, None]
            padded = padded.unflatten(0, (len(count), longest))
        # 3 of [images, heads, longest, HEAD_WIDTH]
        q, k, v = padded.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=valid)
        rows = mixed.transpose(1, 2).flatten(2).flatten(0, 1)
        return features + self.output(rows if cell is None else rows.index_select(0, cell))


class CommunicatingActor(TokenActor):
    """A ``TokenActor`` whose agents attend to the living agents of their image before they decide.

    The attention stands behind the first hidden layer. An agent then decides on what others observe
    too, so execution is no longer decentralised in the strict sense: it is MAPPO with actors that
    communicate. What they say to each other counts as the policy's compute.

    Args:
        observation_size, hidden, attention, prior_weight, keep_bias, alpha: as of ``TokenActor``.
        redundancy, redundancy_weight: likewise.
        heads: as of ``AgentAttention``.

    Raises:
        ValueError: there is no head, or no hidden layer.
    """

    def __init__(
        self,
        observation_size: int,
        hidden: Sequence[int],
        attention: int | None,
        prior_weight: float = 1.0,
        keep_bias: float = 0.0,
        alpha: int | None = None,
        redundancy: int | None = None,
        redundancy_weight: float = 0.0,
        heads: int = 1,
    ) -> None:
        super().__init__(
            observation_size, hidden, attention, prior_weight, keep_bias, alpha,
            redundancy, redundancy_weight,
        )  # fmt: skip
        if not hidden:
            raise ValueError("attention among agents needs an actor with a hidden layer")
        self.among_agents = AgentAttention(hidden[0], heads)

    def forward(self, observation: Tensor, image: Tensor | None = None) -> Tensor:
        """Logits [R, 2] of observations [R, D_obs]; ``image`` as of ``AgentAttention``."""
        features = self.among_agents(self.net[:3](observation), image)
        return self.with_prior(self.net[3:](features), observation)


def logits_of(actor: nn.Module, observation: Tensor, image: Tensor | None) -> Tensor:
    """An actor's logits [R, A]; only a ``CommunicatingActor`` is told which image agents are of."""
    if isinstance(actor, CommunicatingActor):
        return actor(observation, image)
    return actor(observation)


def _squared_norm(values: Tensor) -> Tensor:
    """Squared norm of each row, [R, size] -> [R, 1]."""
    return torch.linalg.vector_norm(values, dim=1, keepdim=True).square()


class Critic(nn.Module):
    """The value of an agent's situation: its observation, followed by the global state for a
    central critic.

    Args:
        inputs: size of observation and state together.
        hidden: widths of the hidden layers.
        input_norm: a LayerNorm over the whole input, as MAPPO's authors have it.
        hidden_layers: as an actor's.
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        input_norm: bool = False,
        hidden_layers: HiddenLayers = "gelu",
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inputs) if input_norm else None
        self.net = nn.Sequential(*mlp(inputs, hidden, 1, 1.0, hidden_layers))

    def forward(
        self, observation: Tensor, state: Tensor | None = None, state_of: Tensor | None = None
    ) -> Tensor:
        """Values of observations, each in its state.

        Args:
            observation: [U, D_obs].
            state: the distinct states [S, D_state]; None for a critic that sees none.
            state_of: which of them belongs to each observation, int64 [U].

        Returns:
            [U].
        """
        if state is None or state_of is None:
            inputs = observation if self.norm is None else self.norm(observation)
            return self.net(inputs).squeeze(-1)
        if self.norm is not None:
            inputs = torch.cat([observation, state.index_select(0, state_of)], dim=1)
            return self.net(self.norm(inputs)).squeeze(-1)
        # the first layer is linear in both parts, so each state is multiplied only once
        first = self.net[0]
        assert isinstance(first, nn.Linear)
        own, shared = first.weight.split([observation.shape[1], state.shape[1]], dim=1)
        in_state = F.linear(state, shared, first.bias).index_select(0, state_of)
        projected = torch.addmm(in_state, observation, own.T)  # [U, width]
        return self.net[1:](projected).squeeze(-1)
