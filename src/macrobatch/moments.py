"""The gradients of one window in five numbers, from which its noise is estimated without bias.

Micro-batch j has n_j samples, the mean gradient g_j and the share w_j of the window's loss; gbar = sum_j w_j g_j is the
window's gradient. Per-sample gradients have mean G and covariance Sigma, S = tr(Sigma). Then

    E[sum_j w_j |g_j|^2] = |G|^2 + S sum_j w_j / n_j            E[|gbar|^2] = |G|^2 + S sum_j w_j^2 / n_j
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class GradientMoments:
    """Sums over all micro-batches with terms, on all ranks: float64, shape (), on the device; before clipping.

    `num_micro_batches`: K. `mean_squared_norm`: sum_j w_j |g_j|^2. `squared_norm`: |gbar|^2. `inverse_size`: sum_j w_j
    / n_j. `weighted_inverse_size`: sum_j w_j^2 / n_j. `squared_norms`: |g_j|^2 of this rank's micro-batches, in order,
    0 for one without terms.
    """

    num_micro_batches: Tensor
    mean_squared_norm: Tensor
    squared_norm: Tensor
    inverse_size: Tensor
    weighted_inverse_size: Tensor
    squared_norms: Tensor

    @property
    def variance(self) -> Tensor:
        """S_hat, shape (): the trace of the covariance of one sample's gradient, without bias; NaN for K = 1."""
        between = (self.mean_squared_norm - self.squared_norm) / (self.inverse_size - self.weighted_inverse_size)
        return between.where(self.num_micro_batches > 1, float("nan"))

    @property
    def squared_mean(self) -> Tensor:
        """The squared norm of the true gradient G, shape (), without bias, so it may be negative; NaN for K = 1."""
        return self.squared_norm - self.variance * self.weighted_inverse_size
