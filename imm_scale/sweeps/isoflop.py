"""The compute-optimal size: minima of isoFLOP curves, by parabola and by variable projection.

A parabola in log N through the losses of one budget is the usual way (Hoffmann et al., approach 2), but the true curve
is no parabola: its minimum is biased where the exponents differ or the sizes lie to one side of it. Variable projection
fits L = E + A / N^alpha + B / D^beta itself: for given exponents the rest is linear, so the search has two dimensions,
and the minimum follows in closed form.

S resamples, n points.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize, nnls

from imm_scale.errors import UserError
from imm_scale.sweeps.scaling_law import LEVEL, Interval, interval_of, widening

Array = np.ndarray
RESAMPLES = 200
_GRID = np.geomspace(0.05, 3.0, 18)
_LIMITS = (0.01, 5.0)


@dataclass(frozen=True)
class Cost:
    """Training FLOPs of one image by a net of N parameters: factor * N^power; the power is 1 for large nets."""

    factor: float
    power: float

    def __call__(self, N: Array | float) -> Array:
        return self.factor * np.asarray(N, float) ** self.power

    def images(self, C: Array | float, N: Array | float) -> Array:
        """Images that a budget of C pays for."""
        return np.asarray(C, float) / self(N)


def cost_of(N: Array, flops_per_image: Array) -> Cost:
    """The straight line through log FLOPs against log parameters. Raises UserError for a single size."""
    if len(np.unique(N)) < 2:
        raise UserError("one size does not say how FLOPs grow with parameters: add a size")
    power, factor = np.polyfit(np.log(N), np.log(flops_per_image), 1)
    return Cost(float(np.exp(factor)), float(power))


def optimal_size(A: Array, alpha: Array, B: Array, beta: Array, cost: Cost, C: Array | float) -> Array:
    """argmin over N of A / N^alpha + B / D^beta with C = cost(N) D; nan where there is no minimum.

    alpha A N^-alpha = power beta B (C / factor)^-beta N^(power beta), hence the closed form.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        exponent = alpha + cost.power * beta
        ratio = alpha * A / (cost.power * beta * B) * (np.asarray(C, float) / cost.factor) ** beta
        size = ratio ** (1.0 / exponent)
    return np.where((np.minimum(alpha, beta) > 0) & np.isfinite(size) & (size > 0), size, np.nan)


@dataclass(frozen=True)
class Minimum:
    """The best size at one budget.

    Attributes:
        size: parameters, with interval; nan where there is no minimum.
        loss: at the minimum.
        note: what is doubtful about it, "" if nothing.
    """

    budget: float
    size: Interval
    loss: float
    note: str = ""


@dataclass(frozen=True)
class Optimum:
    """Minima and how they grow: N_opt = coefficient * C^exponent.

    Attributes:
        method: "parabola" or "variable projection".
        exponent: with interval.
        warnings: what the data cannot tell.
    """

    method: str
    minima: tuple[Minimum, ...]
    exponent: Interval
    coefficient: float
    warnings: tuple[str, ...] = ()

    def size(self, C: Array | float) -> Array:
        """Best size at a compute budget of C FLOPs: coefficient * C^exponent, of the shape of C."""
        return self.coefficient * np.asarray(C, float) ** self.exponent.value


def _growth(budgets: Array, sizes_SK: Array) -> tuple[Array, Array]:
    """Slope and intercept of log N_opt against log C per row; nan where fewer than two minima exist."""
    slopes, intercepts = np.full(len(sizes_SK), np.nan), np.full(len(sizes_SK), np.nan)
    for row, sizes in enumerate(sizes_SK):
        known = np.isfinite(sizes) & (sizes > 0)  # a steep parabola may reach sizes that are 0 in float64
        if known.sum() >= 2:
            slopes[row], intercepts[row] = np.polyfit(np.log(budgets[known]), np.log(sizes[known]), 1)
    return slopes, intercepts


def _interval(value: float, samples: Array) -> Interval:
    """Of the resamples that have a value; of unknown width where less than half of them do."""
    known = samples[np.isfinite(samples)]
    if not np.isfinite(value) or len(known) < len(samples) / 2:
        return Interval(float(value), float("-inf"), float("inf"))
    return interval_of(value, known, LEVEL)


# --- parabola ---


def _vertex(log_N: Array, log_loss_Sn: Array) -> tuple[Array, Array]:
    """log N and log loss at the minimum per row; nan where the curve is not convex."""
    centre = log_N.mean()
    a, b, c = np.polyfit(log_N - centre, log_loss_Sn.T, 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        x = np.where(a > 0, -b / (2 * a), np.nan)
    return x + centre, c + b * x + a * x**2


def parabola(C_n: Array, N_n: Array, loss_n: Array) -> Optimum:
    """A parabola in log N per budget, through log losses.

    Raises:
        UserError: fewer than two budgets with three sizes each.
    """
    C_n, N_n, loss_n = (np.asarray(values, float) for values in (C_n, N_n, loss_n))
    budgets = [C for C in np.unique(C_n) if len(np.unique(N_n[C_n == C])) >= 3]
    if len(budgets) < 2:
        raise UserError("isoFLOP parabolas need at least two budgets with three sizes each")
    rng = np.random.default_rng(0)
    minima, samples = [], []
    for C in budgets:
        at = C_n == C
        x, y = np.log(N_n[at]), np.log(loss_n[at])
        fitted = np.polyval(np.polyfit(x - x.mean(), y, 2), x - x.mean())
        noise = (y - fitted) * widening(len(y), 3)
        resampled = fitted + rng.choice([-1.0, 1.0], (RESAMPLES, len(y))) * noise
        place, value = (float(v[0]) for v in _vertex(x, y[None]))
        samples.append(np.exp(_vertex(x, resampled)[0]))
        note = _parabola_note(place, x, len(y))
        minima.append(Minimum(float(C), _interval(float(np.exp(place)), samples[-1]), float(np.exp(value)), note))
    return _optimum("parabola", minima, np.stack(samples, axis=1))


def _parabola_note(place: float, log_N: Array, points: int) -> str:
    if not np.isfinite(place):
        return "no minimum: the curve is not convex"
    if not log_N.min() <= place <= log_N.max():
        return "outside the sizes measured: extrapolated"
    return "three points, no residual" if points == 3 else ""


def _optimum(method: str, minima: Sequence[Minimum], samples_SK: Array) -> Optimum:
    budgets = np.array([minimum.budget for minimum in minima])
    values = np.array([minimum.size.value for minimum in minima])
    slope, intercept = (float(v[0]) for v in _growth(budgets, values[None]))
    exponent = _interval(slope, _growth(budgets, samples_SK)[0])
    warnings = [f"{method}, C = {m.budget:.3g}: {m.note}" for m in minima if m.note]
    if exponent.covers(0.0):
        warnings.append(f"{method}: the optimal size may not grow with compute at all: exponent {exponent}")
    return Optimum(method, tuple(minima), exponent, float(np.exp(intercept)), tuple(warnings))


# --- variable projection ---


def _project(log_alpha_beta: Array, u_n2: Array, target_n: Array, weight_n: Array) -> tuple[float, Array]:
    """Least squares with nonnegative E, A, B at given exponents: (root sum of squares, coefficients)."""
    alpha, beta = np.exp(np.clip(log_alpha_beta, *np.log(_LIMITS)))
    design = np.stack([np.ones(len(u_n2)), np.exp(-alpha * u_n2[:, 0]), np.exp(-beta * u_n2[:, 1])], axis=1)
    coefficients, distance = nnls(design * weight_n[:, None], target_n * weight_n)
    return float(distance), coefficients


def _search(u_n2: Array, loss_n: Array, weight_n: Array, start: Array | None = None) -> Array:
    """(E, A, alpha, B, beta) in centred variables, the best over a grid of exponents, then by Nelder and Mead."""

    def distance(log_alpha_beta: Array) -> float:
        return _project(log_alpha_beta, u_n2, loss_n, weight_n)[0]

    if start is None:
        grid = [np.log([alpha, beta]) for alpha in _GRID for beta in _GRID]
        start = min(grid, key=distance)
    fit = minimize(distance, start, method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-12, "maxiter": 400})
    alpha, beta = np.exp(np.clip(fit.x, *np.log(_LIMITS)))
    E, A, B = _project(fit.x, u_n2, loss_n, weight_n)[1]
    return np.array([E, A, alpha, B, beta])


def variable_projection(C_n: Array, N_n: Array, D_n: Array, loss_n: Array, cost: Cost) -> Optimum:
    """The minima of the surface L(N, D), least squares of relative errors.

    Raises:
        UserError: fewer points than the five constants, or fewer than two sizes or budgets.
    """
    C_n, N_n, D_n, loss_n = (np.asarray(values, float) for values in (C_n, N_n, D_n, loss_n))
    budgets = np.unique(C_n)
    if len(loss_n) < 5 or len(budgets) < 2 or len(np.unique(N_n)) < 2:
        raise UserError(f"variable projection needs 5 points, 2 sizes and 2 budgets; there are {len(loss_n)} points")
    logs = np.log(np.stack([N_n, D_n], axis=1))
    centre = logs.mean(axis=0)
    u = logs - centre
    best = _search(u, loss_n, 1.0 / loss_n)
    fitted = _surface(best, u)
    noise = np.log(loss_n / fitted) * widening(len(loss_n), 5)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (RESAMPLES, len(loss_n)))
    start = np.log(best[[2, 4]])
    resampled = fitted * np.exp(signs * noise)
    thetas = np.stack([best, *(_search(u, row, 1.0 / fitted, start) for row in resampled)])
    sizes = _minima(thetas, centre, cost, budgets)
    minima = []
    for k, C in enumerate(budgets):
        size = _interval(sizes[0, k], sizes[1:, k])
        place = np.array([[np.log(size.value), np.log(cost.images(C, size.value))]]) - centre
        note = "" if N_n.min() <= size.value <= N_n.max() else _outside(size.value)
        minima.append(Minimum(float(C), size, float(_surface(best, place)[0]), note))
    return _optimum("variable projection", minima, sizes[1:])


def _outside(size: float) -> str:
    if np.isnan(size):
        return "no minimum: size or images do not matter here"
    return "outside the sizes measured: extrapolated"


def _surface(theta: Array, u_n2: Array) -> Array:
    E, A, alpha, B, beta = theta
    return E + A * np.exp(-alpha * u_n2[:, 0]) + B * np.exp(-beta * u_n2[:, 1])


def _minima(theta_S5: Array, centre: Array, cost: Cost, budgets: Array) -> Array:
    """Optimal sizes per row and budget, (S, K)."""
    _, A, alpha, B, beta = theta_S5.T
    A, B = A * np.exp(alpha * centre[0]), B * np.exp(beta * centre[1])
    with np.errstate(divide="ignore"):
        return np.stack([optimal_size(A, alpha, B, beta, cost, C) for C in budgets], axis=1)
