# SPDX-License-Identifier: Apache-2.0
"""The original's sparse layer in torch, to be measured against: its algorithm
is that of DeepSpeed 0.9.5 (`top2gating`, `MOELayer`), written anew.

One group of all tokens of the batch, one-hot factors of S x E x C for the way
to the experts and back, and a loop over the experts. So it costs more than
linearly in the tokens.

Letters: B rows, T positions, S tokens, E experts, C slots of an expert
(capacity), D width.
"""

import math

import torch
from torch import nn
from torch.nn import functional


class Swiglu(nn.Module):
  """down(silu(gate(x)) * up(x)), without biases."""

  def __init__(self, width: int, mlp_width: int):
    super().__init__()
    self.gate = nn.Linear(width, mlp_width, bias=False)
    self.up = nn.Linear(width, mlp_width, bias=False)
    self.down = nn.Linear(mlp_width, width, bias=False)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.down(functional.silu(self.gate(x)) * self.up(x))


def top2(
    logits_SE: torch.Tensor, capacity: int, sampled: bool
) -> tuple[torch.Tensor, torch.Tensor]:
  """How tokens are combined from slots, and the balance loss.

  Args:
    logits_SE: float32.
    capacity: slots of an expert; what comes later is dropped.
    sampled: the second choice is drawn (Gumbel) among the other experts; else
      it is the second largest.

  Returns:
    combine_SEC, float32: the weight of a token in its slots, 0 elsewhere; and
    E sum_e F_e P_e of the first choices, a scalar.
  """
  experts = logits_SE.shape[1]
  probs_SE = torch.softmax(logits_SE, dim=1)
  first_SE = functional.one_hot(probs_SE.argmax(dim=1), experts)
  scores_SE = logits_SE
  if sampled:
    scores_SE = logits_SE - torch.empty_like(logits_SE).exponential_().log()
  others_SE = scores_SE.masked_fill(first_SE.bool(), -math.inf)
  second_SE = functional.one_hot(others_SE.argmax(dim=1), experts)
  share_E = first_SE.float().mean(dim=0)
  balance = experts * torch.sum(share_E * probs_SE.mean(dim=0))
  # All first choices come before all second ones.
  places = (
      first_SE.cumsum(dim=0) - 1,
      second_SE.cumsum(dim=0) - 1 + first_SE.sum(dim=0),
  )
  chosen = [
      mask_SE * (place_SE < capacity)
      for mask_SE, place_SE in zip((first_SE, second_SE), places, strict=True)
  ]
  weights = [(probs_SE * mask_SE).sum(dim=1) for mask_SE in chosen]
  total_S = (weights[0] + weights[1]).clamp(min=torch.finfo(torch.float32).eps)
  combine_SEC = torch.zeros(())
  for n in range(2):
    slot_S = (places[n] * chosen[n]).sum(dim=1)
    slot_SC = functional.one_hot(slot_S, capacity).float()
    weight_SE = (weights[n] / total_S)[:, None] * chosen[n]
    part_SEC = torch.einsum('se,sc->sec', weight_SE, slot_SC)
    combine_SEC = part_SEC if n == 0 else combine_SEC + part_SEC
  return combine_SEC, balance


class EinsumMoe(nn.Module):
  """Top-2 of E SwiGLU networks, by one-hot products over the whole batch.

  Attributes:
    balance_loss: of the last forward pass.
  """

  def __init__(
      self,
      width: int,
      mlp_width: int,
      experts: int,
      capacity_factor: float,
      sampled: bool,
  ):
    super().__init__()
    self.router = nn.Linear(width, experts, bias=False)
    self.experts = nn.ModuleList(
        Swiglu(width, mlp_width) for _ in range(experts)
    )
    self._factor, self._sampled = capacity_factor, sampled
    self.balance_loss = torch.zeros(())

  def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
    x_SD = x_BTD.reshape(-1, x_BTD.shape[-1])
    slots = len(x_SD) / len(self.experts) * 2 * self._factor
    logits_SE = functional.linear(x_SD.float(), self.router.weight.float())
    combine_SEC, self.balance_loss = top2(
        logits_SE, math.ceil(slots), self._sampled
    )
    dispatch_SEC = combine_SEC.bool().to(x_SD.dtype)
    x_ECD = torch.einsum('sec,sd->ecd', dispatch_SEC, x_SD)
    y_ECD = torch.stack(
        [expert(x_ECD[n]) for n, expert in enumerate(self.experts)]
    )
    y_SD = torch.einsum('sec,ecd->sd', combine_SEC.to(x_SD.dtype), y_ECD)
    return y_SD.reshape(x_BTD.shape)
