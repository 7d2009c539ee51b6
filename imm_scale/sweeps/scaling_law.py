"""Scaling laws: sums of powers with an offset, fitted to measured losses, with intervals by resampling.

L(x) = E + sum_k A_k / x_k^p_k, one power (of training compute, say) or two (parameters N and images D: Hoffmann et al.,
arXiv 2203.15556, eq 2). The fit minimizes Huber losses of log residuals, the logarithm of L being a log-sum-exp, from
many starting points. Intervals come from a wild bootstrap: residuals, widened for the freedom the fit has used, go back
to their points with random signs, so the design stays as it was and the noise may differ from point to point.

S resamples or starts, n points, V variables, P parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls
from scipy.stats import norm, t

from imm_scale.errors import UserError

Array = np.ndarray
HUBER_DELTA = 1e-3  # of log residuals, as Hoffmann et al.: a median fit where the noise is larger
_EFFICIENT = 1.345  # delta over the noise: 95 % as efficient as least squares where the noise is normal
_MEDIAN_TO_STD = 1.4826
LEVEL = 0.9
RESAMPLES = 400
_EXPONENTS = (0.1, 0.25, 0.5, 0.8, 1.2, 2.0)  # of starting points
_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Form:
    """The shape of a law: which variables carry a power, and whether there is an offset E.

    Parameters are in the order e, c_1, p_1, c_2, p_2, ...: L = exp(e) + sum_k exp(c_k - p_k u_k), u_k the centred
    logarithm of the variable.
    """

    variables: tuple[int, ...]
    offset: bool = True

    @property
    def parameters(self) -> int:
        """Free parameters: a coefficient and an exponent a variable, and the offset."""
        return int(self.offset) + 2 * len(self.variables)

    def terms(self, theta_SP: Array, u_nV: Array) -> Array:
        """Logarithms of the terms, (S, n, terms)."""
        columns = [np.broadcast_to(theta_SP[:, :1], (len(theta_SP), len(u_nV)))] if self.offset else []
        for k, variable in enumerate(self.variables):
            c, p = self._place(k)
            columns.append(theta_SP[:, c, None] - theta_SP[:, p, None] * u_nV[None, :, variable])
        return np.stack(columns, axis=-1)

    def _place(self, k: int) -> tuple[int, int]:
        first = int(self.offset) + 2 * k
        return first, first + 1

    def log_loss(self, theta_SP: Array, u_nV: Array) -> Array:
        """(S, n)."""
        return np.logaddexp.reduce(self.terms(theta_SP, u_nV), axis=-1)

    def jacobian(self, theta_SP: Array, u_nV: Array) -> tuple[Array, Array]:
        """log_loss and its derivatives, (S, n) and (S, n, P)."""
        terms = self.terms(theta_SP, u_nV)
        value = np.logaddexp.reduce(terms, axis=-1)
        share = np.exp(terms - value[..., None])
        columns = [share[..., 0]] if self.offset else []
        for k, variable in enumerate(self.variables):
            weight = share[..., int(self.offset) + k]
            columns += [weight, -weight * u_nV[None, :, variable]]
        return value, np.stack(columns, axis=-1)


POWER = Form((0,))
JOINT = Form((0, 1))


def huber(residual: Array, delta: float) -> Array:
    """Huber loss of residuals, of their shape: quadratic up to delta, linear beyond."""
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta))


def minimize(form: Form, u_nV: Array, y_Sn: Array, theta_SP: Array, delta: float, iterations: int = 400) -> Array:
    """Levenberg-Marquardt on Huber losses (reweighted least squares), all rows at once; (S, P).

    Every row only ever goes down, so it ends at or below its start.
    """
    theta = theta_SP.copy()
    damping = np.full(len(theta), 1e-2)
    loss = huber(y_Sn - form.log_loss(theta, u_nV), delta).sum(axis=1)
    live = np.arange(len(theta))
    for _ in range(iterations):
        trial, before = _step(form, u_nV, y_Sn[live], theta[live], damping[live], delta), loss[live]
        after = huber(y_Sn[live] - form.log_loss(trial, u_nV), delta).sum(axis=1)
        better = after < before
        theta[live[better]], loss[live[better]] = trial[better], after[better]
        damping[live] = np.clip(np.where(better, damping[live] / 3, damping[live] * 4), 1e-12, 1e12)
        settled = (better & (before - after <= _TOLERANCE * before)) | (damping[live] > 1e9)
        live = live[~settled]
        if not len(live):
            break
    return theta


def _step(form: Form, u_nV: Array, y_Sn: Array, theta: Array, damping: Array, delta: float) -> Array:
    value, jacobian = form.jacobian(theta, u_nV)
    residual = y_Sn - value
    weight = np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300)) / delta
    weighted = jacobian * weight[..., None]
    normal = np.einsum("snp,snq->spq", weighted, jacobian)
    diagonal = np.einsum("spp->sp", normal)
    normal = (
        normal
        + np.eye(form.parameters) * (damping[:, None] * (diagonal + 1e-9 * diagonal.max(1, keepdims=True)))[:, None, :]
    )
    gradient = np.einsum("snp,sn->sp", weighted, residual)
    move = np.linalg.solve(normal + 1e-300 * np.eye(form.parameters), gradient[..., None])[..., 0]
    trial = theta + np.clip(move, -2.0, 2.0)
    return _bounded(form, trial, y_Sn)


def _bounded(form: Form, theta: Array, y_Sn: Array) -> Array:
    """Keeps terms above exp(-12) of the smallest loss (0, for all one can see) and exponents in [-1, 5]."""
    low, high = y_Sn.min(axis=1) - 12.0, y_Sn.max(axis=1) + 3.0
    bounded = theta.copy()
    exponents = [form._place(k)[1] for k in range(len(form.variables))]
    for column in range(form.parameters):
        if column in exponents:
            bounded[:, column] = np.clip(theta[:, column], -1.0, 5.0)
        else:
            bounded[:, column] = np.clip(theta[:, column], low, high)
    return bounded


def _starts(form: Form, u_nV: Array, y_n: Array) -> Array:
    """A start per combination of exponents, its linear part by least squares on relative errors; (S, P)."""
    grids = np.meshgrid(*[_EXPONENTS] * len(form.variables), indexing="ij")
    starts = []
    for exponents in np.stack([grid.ravel() for grid in grids], axis=-1):
        columns = [np.ones(len(y_n))] if form.offset else []
        columns += [np.exp(-p * u_nV[:, v]) for p, v in zip(exponents, form.variables, strict=True)]
        design = np.stack(columns, axis=1) / np.exp(y_n)[:, None]
        linear, _ = nnls(design, np.ones(len(y_n)))
        logs = np.log(np.maximum(linear, 1e-3 * np.exp(y_n.min())))
        row = list(logs[:1]) if form.offset else []
        for k, p in enumerate(exponents):
            row += [logs[int(form.offset) + k], p]
        starts.append(row)
    return np.array(starts)


@dataclass(frozen=True)
class Interval:
    """An estimate and its interval at LEVEL."""

    value: float
    low: float
    high: float

    def covers(self, value: float) -> bool:
        """Whether a value lies inside, ends included."""
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def interval_of(value: float, samples_S: Array, level: float = LEVEL) -> Interval:
    """The interval between quantiles of bootstrap samples, (S,), that holds `level` of them."""
    low, high = np.quantile(samples_S, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))


def widening(points: int, parameters: int) -> float:
    """By how much residuals of a fit are smaller than the noise, and Student's intervals wider than the normal's."""
    free = max(1, points - parameters)
    upper = (1 + LEVEL) / 2
    return float(np.sqrt(points / free) * t.ppf(upper, free) / norm.ppf(upper))


@dataclass(frozen=True)
class Law:
    """A fitted law.

    Attributes:
        centre_V: means of the variables' logarithms; parameters are about them.
        theta_P: the fit.
        samples_SP: fits to resamples.
        residuals_n: of the logarithm.
        noise_n: residuals widened to the size of the noise.
        aicc: Akaike's criterion for small samples; inf where there are too few points for it.
        agreeing_starts: share of the starting points that ended at the same loss.
        warnings: what the data cannot tell, in words.
    """

    form: Form
    names: tuple[str, ...]
    centre_V: Array
    theta_P: Array
    samples_SP: Array
    residuals_n: Array
    noise_n: Array
    aicc: float
    agreeing_starts: float
    warnings: tuple[str, ...] = ()

    def __call__(self, *x: Array | float) -> Array:
        """The law's loss at values of its variables (arrays of one shape)."""
        return np.exp(self.form.log_loss(self.theta_P[None], self._centred(x)))[0].reshape(np.shape(x[0]))

    def samples(self, *x: Array | float) -> Array:
        """The loss by each resample, (S, n)."""
        return np.exp(self.form.log_loss(self.samples_SP, self._centred(x)))

    def band(self, *x: Array | float, level: float = LEVEL) -> tuple[Array, Array]:
        """Interval of the law itself at each point."""
        low, high = np.quantile(self.samples(*x), [(1 - level) / 2, (1 + level) / 2], axis=0)
        return low, high

    def predict(self, *x: float, level: float = LEVEL) -> Interval:
        """What another measurement at this place would show: the law's uncertainty and the noise of one point."""
        rng = np.random.default_rng(0)
        law = self.samples(*x)[:, 0]
        noise = rng.choice(self.noise_n, len(law)) * rng.choice([-1.0, 1.0], len(law))
        return interval_of(float(self(*x)), law * np.exp(noise), level)

    def constants(self, theta_SP: Array | None = None) -> dict[str, Array]:
        """{"E", "A_x", "exponent_x"} in the variables' own units, one value per row."""
        theta = self.theta_P[None] if theta_SP is None else theta_SP
        constants = {"E": np.exp(theta[:, 0]) if self.form.offset else np.zeros(len(theta))}
        for k, variable in enumerate(self.form.variables):
            c, p = self.form._place(k)
            name = self.names[variable]
            constants[f"A_{name}"] = np.exp(theta[:, c] + theta[:, p] * self.centre_V[variable])
            constants[f"exponent_{name}"] = theta[:, p]
        return constants

    def intervals(self, level: float = LEVEL) -> dict[str, Interval]:
        """Constants with their intervals."""
        samples = self.constants(self.samples_SP)
        return {name: interval_of(value[0], samples[name], level) for name, value in self.constants().items()}

    def _centred(self, x: Sequence[Array | float]) -> Array:
        return np.stack([np.log(np.ravel(value)) for value in x], axis=-1) - self.centre_V


def power_law(x: Array, loss: Array, delta: float | None = None, resamples: int = RESAMPLES) -> Law:
    """L = E + A / x^p of compute x; constants E, A_C, exponent_C. Raises UserError as `fit`."""
    return fit(POWER, ("C",), np.asarray(x, float)[:, None], loss, delta, resamples)


def joint_law(N: Array, D: Array, loss: Array, delta: float | None = None, resamples: int = RESAMPLES) -> Law:
    """L = E + A / N^alpha + B / D^beta; constants A_N, exponent_N (alpha), A_D (B), exponent_D (beta)."""
    return fit(JOINT, ("N", "D"), np.stack([N, D], axis=1).astype(float), loss, delta, resamples)


def fit(form: Form, names: tuple[str, ...], x_nV: Array, loss_n: Array, delta: float | None, resamples: int) -> Law:
    """Fits a law and its resamples, and says what the data cannot tell.

    Args:
        x_nV, loss_n: values of the variables, and the losses there.
        delta: log residuals up to this count by their square, larger ones by their size. None: 1.345 times the noise
            that a median fit (HUBER_DELTA) leaves, so that outliers count little and the intervals hold; those of a
            median fit are too narrow.

    Raises:
        UserError: fewer points than parameters, a variable with too few values, or losses and variables that are not
            positive numbers.
    """
    loss_n = np.asarray(loss_n, float)
    _check(form, names, x_nV, loss_n)
    centre = np.log(x_nV).mean(axis=0)
    u, y = np.log(x_nV) - centre, np.log(loss_n)
    delta = _delta(form, u, y) if delta is None else delta
    theta, agreeing = best_of_starts(form, u, y, delta)
    residuals = y - form.log_loss(theta[None], u)[0]
    noise = residuals * widening(len(y), form.parameters)
    samples = _resample(form, u, y - residuals, noise, theta, delta, resamples)
    law = Law(form, names, centre, theta, samples, residuals, noise, _aicc(form, residuals, delta), agreeing)
    return Law(**{**law.__dict__, "warnings": tuple(_doubts(law, u, y, delta))})


def _check(form: Form, names: tuple[str, ...], x_nV: Array, loss_n: Array) -> None:
    if len(loss_n) < form.parameters:
        raise UserError(
            f"{len(loss_n)} points cannot carry a law of {form.parameters} parameters: measure more, or fit fewer"
        )
    if not (np.isfinite(loss_n).all() and np.isfinite(x_nV).all() and (loss_n > 0).all() and (x_nV > 0).all()):
        raise UserError("a law is fitted to positive finite numbers: leave diverged cells out")
    needed = 3 if form.offset and len(form.variables) == 1 else 2
    for variable in form.variables:
        values = len(np.unique(x_nV[:, variable]))
        if values < needed:
            raise UserError(f"{names[variable]} has {values} different values, a power of it needs at least {needed}")


def best_of_starts(form: Form, u_nV: Array, y_n: Array, delta: float) -> tuple[Array, float]:
    """The best end point, and the share of starting points that ended within 1e-4 of its loss."""
    starts = _starts(form, u_nV, y_n)
    ends = minimize(form, u_nV, np.broadcast_to(y_n, (len(starts), len(y_n))), starts, delta)
    losses = huber(y_n - form.log_loss(ends, u_nV), delta).sum(axis=1)
    close = losses <= losses.min() * (1 + 1e-4) + 1e-12
    return ends[losses.argmin()], float(close.mean())


def _delta(form: Form, u_nV: Array, y_n: Array) -> float:
    theta, _ = best_of_starts(form, u_nV, y_n, HUBER_DELTA)
    sizes = np.abs(y_n - form.log_loss(theta[None], u_nV)[0])
    # The median fit passes through as many points as it has parameters.
    noise = _MEDIAN_TO_STD * np.median(np.sort(sizes)[min(form.parameters, len(sizes) - 1) :])
    return max(HUBER_DELTA, _EFFICIENT * float(noise))


def _resample(form: Form, u: Array, fitted: Array, noise: Array, theta: Array, delta: float, count: int) -> Array:
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (count, len(noise)))
    return minimize(form, u, fitted + signs * noise, np.tile(theta, (count, 1)), delta)


def _aicc(form: Form, residuals: Array, delta: float) -> float:
    """Twice the Huber loss stands for the sum of squares, which it is where no residual exceeds delta."""
    n, k = len(residuals), form.parameters + 1  # the noise's size is a parameter as well
    if n <= k + 1:
        return float("inf")
    scale = 2.0 * huber(residuals, delta).sum() / n
    return float(n * np.log(max(scale, 1e-300)) + 2 * k + 2 * k * (k + 1) / (n - k - 1))


def _doubts(law: Law, u_nV: Array, y_n: Array, delta: float) -> list[str]:
    """Simpler laws that the data would not tell from this one, and constants whose interval holds 0."""
    doubts = []
    n = len(y_n)
    if n <= law.form.parameters + 2:
        doubts.append(f"{n} points for {law.form.parameters} parameters: the fit passes near them whatever the truth")
    for simpler, difference in _simpler(law):
        theta, _ = best_of_starts(simpler, u_nV, y_n, delta)
        aicc = _aicc(simpler, y_n - simpler.log_loss(theta[None], u_nV)[0], delta)
        if aicc < law.aicc + 2:
            doubts.append(
                f"the data do not tell this law from one {difference} (AICc {aicc:.1f} against {law.aicc:.1f})"
            )
    for name, interval in law.intervals().items():
        if name.startswith("exponent") and interval.low <= 0.02:
            doubts.append(f"{name} may be 0: {interval}")
    return doubts


def _simpler(law: Law) -> list[tuple[Form, str]]:
    form = law.form
    simpler = [(Form(form.variables, offset=False), "without an offset E")] if form.offset else []
    if len(form.variables) > 1:
        for dropped in form.variables:
            variables = tuple(v for v in form.variables if v != dropped)
            simpler.append((Form(variables, form.offset), f"in which {law.names[dropped]} does not matter"))
    return simpler
