"""Heads of token nets against fp64 on the CPU, what their chunks of the vocabulary keep of memory, and kept keys.

The figures are of random weights: rates are those of trained ones, but how many tokens of a draft stay is not.
"""

import contextlib
import copy
from collections.abc import Iterator
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import abilities, kept_keys
from benchmarks.gpu.report import Context, Report
from benchmarks.gpu.timing import Budget, Stopwatch, extra_memory, part
from imm_scale import rng
from imm_scale.models.heads import Head, HeadConfig, build, unembedding
from imm_scale.precision import computing

KINDS = {
    "factorized": HeadConfig(),
    "mixture": HeadConfig("mixture", components=4),
    "chain": HeadConfig("chain", components=4),
    "autoregressive": HeadConfig("autoregressive"),
    "uniform_conditioned": HeadConfig("uniform_conditioned"),
}
# A sum of 12 log-probabilities of some 5 nats, and its gradient, by products rounded to 2^-24 and kernels that sum in
# another order: 2e-7 and 8e-6 at most on a CPU.
_LOG_PROB, _GRADIENT = 1e-5, 1e-4
# States and hidden layers rounded to 2^-9; logits and all sums are fp32: 2e-4 and 5e-3 on a CPU.
_LOG_PROB_BF16, _GRADIENT_BF16 = 1e-2, 3e-2
# The student reads uniforms by sinusoids of up to 400 turns, and where they lie is what the teacher's rounded states
# say: a shift of 1e-4 is a quarter of a radian. 1e-3 and 8e-2 on a CPU.
_OF_STUDENTS_BF16 = 3e-1
_SECONDS = 5  # of the timings of one vocabulary, or of kept keys
_VOCABULARY, _WIDTH, _ROWS, _TOKENS = 50257, 1152, 16384, 256  # GPT-2's, XL's, and a micro-batch of 64 samples
_CHUNKS = 4  # of logits at once: themselves, what logsumexp makes of them, and where a token is looked up


def run(context: Context, report: Report) -> None:
    budget = Budget(context, "heads")
    for name in KINDS:
        prove(context, report, name)
    kept_keys.prove(context, report)
    with computing("fp32", context.device):
        if budget.allows(report, "vocabulary", _SECONDS):
            with part(report, "vocabulary"):
                _measure_vocabulary(context, report)
    if budget.allows(report, "kept keys", _SECONDS):
        with part(report, "kept keys"):
            kept_keys.measure(context, report)
    if budget.allows(report, "heads", _SECONDS):
        with part(report, "heads"):
            _measure_heads(context, report)


@contextlib.contextmanager
def _small_chunks() -> Iterator[None]:
    """Vocabularies of the proofs in several chunks, rows too."""
    with patch.object(unembedding, "CELLS", 1 << 10), patch.object(unembedding, "_ROWS", 1 << 5):
        yield


class _Problem:
    """A head in fp64 on the CPU, all weights random, states, tokens, the set S and uniforms."""

    def __init__(
        self, config: HeadConfig, samples: int = 8, positions: int = 12, width: int = 64, vocabulary: int = 99
    ):
        torch.manual_seed(0)
        self.head = build(config, width, vocabulary, heads=4).double()
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        self.h = torch.randn(samples, positions, width, dtype=torch.float64)
        self.x = torch.randint(vocabulary, (samples, positions))
        self.scored = torch.rand(samples, positions) < 0.8
        uniforms = rng.uniform(0, "tokens", torch.arange(samples), 3 * positions).unflatten(1, (positions, 3))
        self.uniform, self.of_draws = uniforms[..., 0].contiguous(), uniforms[..., 1:].contiguous()

    def on(self, device: torch.device) -> "_Problem":
        """The same there, in fp32 but for uniforms and tokens."""
        there = copy.copy(self)
        there.head = copy.deepcopy(self.head).float().to(device)
        there.h = self.h.float().to(device)
        for name in ("x", "scored", "uniform", "of_draws"):
            setattr(there, name, getattr(self, name).to(device))
        return there

    def evaluate(self, precision: str = "fp32") -> tuple[Tensor, Tensor]:
        """log q of each sample with what is taught, (N,), and the gradient of the sum, flat; both fp64 on the CPU."""
        self.head.zero_grad(set_to_none=True)
        h = self.h.clone().requires_grad_()
        with computing(precision, h.device):
            out = self.head(h, self.x, self.scored, self.uniform if self.head.takes_uniforms else None)
        assert out.log_prob_N.dtype in (torch.float32, torch.float64), out.log_prob_N.dtype
        loss_N = -out.log_prob_N if out.teaching_N is None else out.teaching_N - out.log_prob_N
        loss_N.sum().backward()
        gradients = [h.grad, *(p.grad for p in self.head.parameters())]
        flat = torch.cat([g.double().flatten().cpu() for g in gradients if g is not None])
        return loss_N.detach().double().cpu(), flat

    @torch.no_grad()
    def in_turn(self) -> Tensor:
        """(N,) the sum of each token's conditional log-probability given those before."""
        state, total_N = self.head.begin(self.h, self.scored), 0.0
        for j in range(self.x.shape[1]):
            log_prob_N = self.head.conditional(state, j).gather(1, self.x[:, j, None])[:, 0]
            total_N = total_N + torch.where(self.scored[:, j], log_prob_N, 0.0)
            state = self.head.observe(state, j, self.x[:, j])
        assert isinstance(total_N, Tensor)
        return total_N

    @torch.no_grad()
    def draw(self) -> Tensor:
        return self.head.sample(self.h, self.scored, self.of_draws).cpu()


def prove(context: Context, report: Report, name: str) -> None:
    """Loss, gradient, conditionals and draws of one kind of head."""
    with _small_chunks():
        _prove(context, report, name, _Problem(KINDS[name]))


def _prove(context: Context, report: Report, name: str, here: _Problem) -> None:
    there, reference = here.on(context.device), here.evaluate()
    log_prob, gradient = _apart(there.evaluate(), reference)
    report.check(f"{name}: loss against fp64, relative", log_prob, at_most=_LOG_PROB)
    report.check(f"{name}: gradient against fp64, relative", gradient, at_most=_GRADIENT)
    with torch.no_grad():
        whole_N = there.head.log_prob(there.h, there.x, there.scored).double()
    apart = float((there.in_turn() - whole_N).norm() / whole_N.norm())
    report.check(f"{name}: log-probability against its conditionals, relative", apart, at_most=_LOG_PROB)
    # A uniform falls between the fp32 and the fp64 distribution function once in some 10^5 draws.
    report.check(f"{name}: tokens drawn otherwise than in fp64", int((there.draw() != here.draw()).sum()), at_most=1)
    missing = abilities.lacks_precision(context, "bf16")
    if missing:
        report.skip(f"{name}, bf16", missing)
        return
    rounded = there.evaluate("bf16")
    log_prob, gradient = _apart(rounded, reference)
    report.check(f"{name}, bf16: loss against fp64, relative", log_prob, at_most=_LOG_PROB_BF16)
    bound = _OF_STUDENTS_BF16 if here.head.takes_uniforms else _GRADIENT_BF16
    report.check(f"{name}, bf16: gradient against fp64, relative", gradient, at_most=bound)
    if name == "factorized":  # a vocabulary's logits and nothing else
        same = torch.equal(rounded[0], there.evaluate()[0])
        report.check(f"{name}, bf16: loss to the bit that of fp32", same, equals=True)


def _apart(actual: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Relative distances of the loss and of the gradient."""
    distances = [float((a - b).norm() / b.norm()) for a, b in zip(actual, reference, strict=True)]
    return distances[0], distances[1]


# ---------------------------------------------------------------------------------------------------------------------
# What they cost


def _measure_vocabulary(context: Context, report: Report) -> None:
    """Loss and gradient of tokens of a large vocabulary, a chunk of it at a time and all at once."""
    rows, width, vocabulary = (64, 32, 999) if context.small else (_ROWS, _WIDTH, _VOCABULARY)
    with context.device:
        layer = unembedding.Unembedding(width, vocabulary)
        h = torch.randn(rows, width, requires_grad=True)
        x = torch.randint(vocabulary, (rows,))

    def chunked() -> None:
        layer.zero_grad(set_to_none=True)
        h.grad = None
        layer(h, x).sum().backward()

    def whole() -> None:
        layer.zero_grad(set_to_none=True)
        h.grad = None
        F.cross_entropy(F.linear(h, layer.weight, layer.bias), x, reduction="sum").backward()

    name = f"{rows} states, vocabulary {vocabulary}"
    ours, stock = Stopwatch(context, rounds=3, warm_ups=1).medians(chunked, whole)
    report.figure(f"{name}: loss and gradient in chunks, fp32", 1e3 * ours, "ms")
    report.figure(f"{name}: time over that of all logits at once", ours / stock)
    with computing("tf32", context.device):
        (faster,) = Stopwatch(context, rounds=3, warm_ups=1).medians(chunked)
    report.figure(f"{name}: loss and gradient in chunks, tf32", 1e3 * faster, "ms")
    _measure_memory(context, report, name, (chunked, whole), (h, *layer.parameters()))


def _measure_memory(context: Context, report: Report, name: str, actions: tuple, leaves: tuple[Tensor, ...]) -> None:
    if context.device.type != "cuda":
        report.skip(f"{name}: memory", "only a GPU counts what its allocator hands out")
        return
    used = []
    for action in actions:
        for leaf in leaves:
            leaf.grad = None
        used.append(extra_memory(action, context.device))
    report.figure(f"{name}: memory beyond states and weights, in chunks", used[0] / 2**20, "MiB")
    report.figure(f"{name}: memory beyond states and weights, all logits at once", used[1] / 2**20, "MiB")
    expected = 4 * (sum(leaf.numel() for leaf in leaves) + _CHUNKS * unembedding.CELLS)
    report.check(f"{name}: memory in chunks over gradients and {_CHUNKS} chunks", used[0] / expected, at_most=1.0)


def _measure_heads(context: Context, report: Report) -> None:
    """Loss and gradient of each head beside that of independent tokens, at a sixteenth of a micro-batch."""
    samples, tokens, width, vocabulary = (2, 8, 32, 99) if context.small else (4, _TOKENS, _WIDTH, _VOCABULARY)
    x = torch.randint(vocabulary, (samples, tokens), device=context.device)
    h = torch.randn(samples, tokens, width, device=context.device)
    scored, uniform = torch.ones_like(x, dtype=torch.bool), torch.rand(x.shape, device=context.device).double()
    one = 0.0
    for name, config in KINDS.items():
        with context.device:
            head = build(config, width, vocabulary, heads=width // 16 if context.small else 16)
        (seconds,) = Stopwatch(context, rounds=3, warm_ups=1).medians(lambda: _step(head, h, x, scored, uniform))  # noqa: B023
        one = one or seconds
        report.figure(f"{name}, {samples} x {tokens} tokens: loss and gradient, bf16", 1e3 * seconds, "ms")
        report.figure(f"{name}: in those of independent tokens", seconds / one)


def _step(head: Head, h: Tensor, x: Tensor, scored: Tensor, uniform: Tensor) -> None:
    head.zero_grad(set_to_none=True)
    with computing("bf16", h.device):
        out = head(h, x, scored, uniform)
    loss_N = -out.log_prob_N if out.teaching_N is None else out.teaching_N - out.log_prob_N
    loss_N.sum().backward()
