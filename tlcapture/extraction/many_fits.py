"""The methods of extraction, for many choices of training examples and labels at once.

The direction that a method finds lies in the span of the training examples, so fits run in coordinates: at most as many
as there are examples, however wide the model is. Cross-validation and relabelling then run thousands of fits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tlcapture.extraction.methods import Features, descend, gradient_start
from tlcapture.extraction.readout import Activations

Training = Bool[Tensor, "n_folds n_examples"]
Relabelled = Bool[Tensor, "n_labellings n_examples"]
Scores = Float[Tensor, "n_folds n_labellings n_layers n_examples"]

_TOLERANCE = 0.01  # of margins; directions then deviate by a cosine of 3e-6
_MOST_STEPS = 1000


@dataclass(frozen=True, eq=False)
class Span:
    """Activations in coordinates of their own span, layer by layer, with one more for the rest of the space.

    Attributes:
        coordinates: `[n_layers, n_examples, d]`, with the distances and products of the activations.
        start: the random unit direction from which `gradient` starts, `[n_layers, d]`.
        d_model: the width of the activations.
    """

    coordinates: Float[Tensor, "n_layers n_examples d"]
    start: Float[Tensor, "n_layers d"]
    d_model: int

    @classmethod
    def of(cls, activations: Activations, *, seed: int = 0) -> Span:
        """The coordinates of activations `[n_layers, n_examples, d_model]` around their mean, found in float64."""
        n_layers, _, d_model = activations.shape
        centred = activations.double()
        centred = centred - centred.mean(dim=1, keepdim=True)
        values, vectors = torch.linalg.eigh(centred @ centred.mT)
        spanned = values > 1e-12 * values[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)
        root = torch.where(spanned, values, 0).sqrt()
        start = gradient_start(n_layers, d_model, seed).double()
        products = torch.einsum("lnk,lnd,ld->lk", vectors, centred, start)
        within = torch.where(spanned, products / torch.where(spanned, root, 1), 0)
        outside = (1 - within.pow(2).sum(dim=1, keepdim=True)).clamp(min=0).sqrt()
        coordinates = torch.nn.functional.pad(vectors * root.unsqueeze(1), (0, 1))
        return cls(coordinates, torch.cat([within, outside], dim=1), d_model)

    def scores(self, method: str, training: Training, labels: Relabelled) -> Scores:
        """Projections of all examples onto the direction that a method finds.

        Args:
            training: the examples that each fold trains on, `[n_folds, n_examples]`.
            labels: which examples count as positive, `[n_labellings, n_examples]`.

        Returns:
            Projections in units of the training examples' spread, `[n_folds, n_labellings, n_layers, n_examples]`.
        """
        signs = (labels.float() * 2 - 1) * training.unsqueeze(1)  # folds, labellings, examples
        if method == "gradient":
            return self._gradient(training, signs)
        data = self._standardised(training)
        weights = _mean_diff(signs) if method == "mean_diff" else _probe(data, training, signs)
        return (data @ (data.mT @ weights)).permute(0, 3, 1, 2)

    def _centres_and_units(self, training: Training) -> tuple[Tensor, Tensor]:
        """Mean `[n_folds, n_layers, d]` and spread `[n_folds, n_layers]` of each fold's training examples."""
        share = training.double() / training.sum(dim=1, keepdim=True)
        centres = torch.einsum("lnd,fn->fld", self.coordinates, share)
        squares = torch.einsum("lnd,fn->fl", self.coordinates.pow(2), share) - centres.pow(2).sum(dim=-1)
        return centres, (squares / self.d_model).clamp(min=torch.finfo(torch.float64).tiny).sqrt()

    def _standardised(self, training: Training) -> Float[Tensor, "n_folds n_layers n_examples d"]:
        centres, units = self._centres_and_units(training)
        return ((self.coordinates - centres.unsqueeze(2)) / units[..., None, None]).float()

    def _gradient(self, training: Training, signs: Tensor) -> Scores:
        centres, units = self._centres_and_units(training)
        n_folds, n_labellings, n_examples = signs.shape
        scale = self.coordinates.pow(2).mean(dim=(1, 2), keepdim=True).sqrt().clamp(min=1e-300)
        features = Features(
            (self.coordinates / scale).float(),
            (centres.permute(1, 2, 0).repeat_interleave(n_labellings, dim=2) / scale).float(),
            (units.T.unsqueeze(1).repeat_interleave(n_labellings, dim=2) / scale).float(),
        )
        flat = signs.reshape(-1, n_examples).T.expand(len(self.start), -1, -1)
        found = features.onto(descend(features, self.start.float(), flat))
        return found.permute(2, 0, 1).reshape(n_folds, n_labellings, len(self.start), n_examples)


def _mean_diff(signs: Tensor) -> Float[Tensor, "n_folds 1 n_examples n_labellings"]:
    positive, negative = (signs > 0).float(), (signs < 0).float()
    weights = positive / positive.sum(dim=-1, keepdim=True) - negative / negative.sum(dim=-1, keepdim=True)
    return weights.mT.unsqueeze(1)


def _probe(
    data: Tensor, training: Training, signs: Tensor
) -> Float[Tensor, "n_folds n_layers n_examples n_labellings"]:
    """The dual weights of the logistic regression of `probe` (C = 1, with an intercept).

    Each step is a ridge regression on the working response of a quadratic bound of the loss (Böhning and Lindsay 1988);
    all steps and all labellings share its factorisation. Nesterov's acceleration begins again where it overshoots.
    """
    trained = training[:, None, :, None].float()  # folds, layers, examples, labellings
    signs = signs.permute(0, 2, 1).unsqueeze(1).expand(-1, data.shape[1], -1, -1)
    shown = data * trained
    kernel = (shown @ shown.mT).double()
    inverse = torch.linalg.inv(kernel + 4 * torch.eye(kernel.shape[-1], dtype=kernel.dtype)).float()
    of_ones = inverse @ trained.expand(*kernel.shape[:-1], 1)
    total = (of_ones * trained).sum(dim=-2, keepdim=True)
    margins = ahead = dual = torch.zeros_like(signs)
    momentum = 1.0
    for _ in range(_MOST_STEPS):
        working = ahead * trained + 4 * signs * torch.sigmoid(-signs * ahead)
        bias = (working * of_ones).sum(dim=-2, keepdim=True) / total
        dual = inverse @ (working - bias * trained)
        reached = (working - 4 * dual) * trained
        change = reached - margins
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        if float(((ahead - reached) * change).sum()) > 0:
            momentum = following = 1.0
        ahead = reached + (momentum - 1) / following * change
        margins, momentum = reached, following
        if float(change.abs().amax()) < _TOLERANCE:
            break
    return dual * trained
