"""Kept keys and values of a causal token net: the same states as without, and what drawing with them costs."""

import torch
from torch import Tensor

from benchmarks.gpu.report import Context, Report
from benchmarks.gpu.timing import Stopwatch
from imm_scale import rng
from imm_scale.methods.base import Steps
from imm_scale.methods.tokens.blocks import blocks
from imm_scale.methods.tokens.token_net import TokenNet
from imm_scale.methods.tokens.verified import Acceptance, decode
from imm_scale.models.heads import HeadConfig
from imm_scale.models.token_transformer import TokenArchitecture, TokenTransformer
from imm_scale.precision import computing

# Two orders of the same fp32 sums, over the layers of a small net: 5e-7 on a CPU.
_SAME = 1e-5
_BLOCK = 4
_CLASSES = 10
_ROUNDS = 2


def _net(context: Context, small: bool) -> TokenNet:
    """Every weight random: the gates that start at zero would hide the blocks."""
    sizes = {"width": 64, "depth": 2, "heads": 4, "length": 16, "vocabulary": 99}
    if not small:
        sizes = {"width": 768, "depth": 12, "heads": 12, "length": 128, "vocabulary": 32000}
    head = HeadConfig("mixture", components=4)
    torch.manual_seed(0)
    with context.device:
        model = TokenTransformer(
            TokenArchitecture(**sizes, num_classes=_CLASSES, causal=True, block=_BLOCK, head=head)  # type: ignore[arg-type]
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return TokenNet(model.eval().requires_grad_(False), sizes["vocabulary"], sizes["length"])


def _inputs(net: TokenNet, samples: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens (N, T) and labels (N,)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(net.mask, (samples, net.length), generator=generator)
    return x.to(device), (torch.arange(samples) % _CLASSES).to(device)


@torch.no_grad()
def prove(context: Context, report: Report) -> None:
    """States token by token, and in pieces of several, against one pass over all of them."""
    net = _net(context, small=True)
    x, label = _inputs(net, 8, context.device)
    with computing("fp32", context.device):
        whole = net.model(x, label)
        for size in (1, _BLOCK + 1):
            apart = float((_in_pieces(net, x, label, size) - whole).norm() / whole.norm())
            report.check(f"states, {size} at a time with kept keys against one pass, relative", apart, at_most=_SAME)
    for name, drawn in (
        ("blocks", _blocks(net, 8, context.device)),
        ("verified", _verified(net, 8, context.device)[0]),
    ):
        outside = int(((drawn < 0) | (drawn >= net.mask)).sum())
        report.check(f"{name}: tokens that are none of the vocabulary", outside, at_most=0)


def _in_pieces(net: TokenNet, x: Tensor, label: Tensor, size: int) -> Tensor:
    """(N, T, D) states of x, so many tokens at a time."""
    cache, states = net.model.empty_cache(len(x)), []
    for piece in torch.arange(x.shape[1], device=x.device).split(size):
        place = piece.expand(len(x), -1)
        states.append(net.model.states_kept(x.gather(1, place), place, label, cache))
    return torch.cat(states, dim=1)


def _drawing(net: TokenNet, samples: int, device: torch.device) -> tuple[TokenNet, Tensor, Tensor, Steps]:
    """What samplers of tokens take, nothing known."""
    times = torch.linspace(1.0, 0.0, net.length // _BLOCK + 1, dtype=torch.float64, device=device)
    start = torch.full((samples, net.length), net.mask, device=device)
    index = torch.arange(samples, device=device)
    uniform = lambda stream, count: rng.uniform(0, "tokens", index, count, stream)  # noqa: E731
    return net, start, index % _CLASSES, Steps(times, uniform=uniform)


def _blocks(net: TokenNet, samples: int, device: torch.device) -> Tensor:
    return blocks(*_drawing(net, samples, device))


def _verified(net: TokenNet, samples: int, device: torch.device) -> tuple[Tensor, Acceptance]:
    return decode(*_drawing(net, samples, device))


@torch.no_grad()
def measure(context: Context, report: Report) -> None:
    """A token more with kept keys and by a pass over all before it; both samplers."""
    net, samples = _net(context, context.small), 4 if context.small else 64
    x, label = _inputs(net, samples, context.device)
    with computing("bf16", context.device):
        _measure_token(context, report, net, x, label)
        _measure_samplers(context, report, net, samples)


def _measure_token(context: Context, report: Report, net: TokenNet, x: Tensor, label: Tensor) -> None:
    half = net.length // 2
    cache = net.model.empty_cache(len(x))
    place = torch.arange(half, device=x.device).expand(len(x), -1)
    net.model.states_kept(x[:, :half], place, label, cache)
    last = place[:, -1:]

    def kept() -> Tensor:
        return net.model.states_kept(x[:, half - 1 : half], last, label, cache)

    one, again = Stopwatch(context, rounds=3).medians(kept, lambda: net.model(x[:, :half], label), times=3)
    name = f"{len(x)} samples, {half} tokens before"
    report.figure(f"{name}: a token with kept keys, bf16", 1e3 * one, "ms")
    report.figure(f"{name}: a pass over all before it, in those", again / one)


def _measure_samplers(context: Context, report: Report, net: TokenNet, samples: int) -> None:
    tokens, watch = samples * net.length, Stopwatch(context, _ROUNDS, warm_ups=1)
    (seconds,) = watch.medians(lambda: _blocks(net, samples, context.device))
    report.figure(f"blocks of {_BLOCK}, {samples} samples: rate", tokens / seconds, "tokens/s")
    decoded: list[Acceptance] = []
    (seconds,) = watch.medians(lambda: decoded.append(_verified(net, samples, context.device)[1]))
    report.figure(f"verified blocks of {_BLOCK}, {samples} samples: rate", tokens / seconds, "tokens/s")
    a_pass = decoded[-1].tokens_a_pass
    report.figure("verified: tokens a pass, of random weights", a_pass)
    report.check("verified: tokens a pass, a draft and one more", a_pass, at_most=_BLOCK + 1)
