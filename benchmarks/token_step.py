"""Nets over tokens beside plain PyTorch: `python -m benchmarks.token_step`, on CPU.

A training step of the masked net at ZeRO stage 0 (engine, average, loss read) against a plain loop over the same net
with torch's cross entropy, AdamW and an average; and verified decoding against drawing one token a pass, on black and
white digits. Actions take turns in one process; ratios are printed, for absolute times on a shared machine mean little.
"""

import argparse
import statistics
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from benchmarks.gpu.timing import Action, ratios, seconds
from imm_scale import build, rng
from imm_scale import config as configs
from imm_scale.build import ModelSpec
from imm_scale.config.schema import Config
from imm_scale.data.batch import Batch
from imm_scale.data.manifest import Manifest, TokenCodec
from imm_scale.data.sample_order import Layout
from imm_scale.methods.base import Steps
from imm_scale.methods.tokens.blocks import blocks
from imm_scale.methods.tokens.verified import decode
from imm_scale.parallel import world
from imm_scale.parallel.deepspeed_engine import Engine
from imm_scale.parallel.ema import ShardedEma

_DECAY, _LR, _LENGTH, _VOCABULARY = 0.999, 1e-4, 128, 256
_CAUSAL = ("method.name=next_block", "model.causal=true")


def _spec(words: Sequence[str], length: int, vocabulary: int, args: argparse.Namespace) -> tuple[Config, ModelSpec]:
    sizes = (f"model.width={args.width}", f"model.depth={args.depth}", "model.heads=4", "model.name=token_transformer")
    batch = (f"train.global_batch_size={args.samples}", f"train.micro_batch_size={args.samples}", "zero.stage=0")
    config = configs.load([], ["data.space.name=tokens", *sizes, *batch, f"ema.decays=[{_DECAY}]", *words]).config
    codec = TokenCodec(vocabulary, "bytes", "0" * 64)
    return config, build.model_spec(config, Manifest(codec, (length,), 1, (), ()))


# --- training ---


def engine_step(args: argparse.Namespace, x_NT: Tensor) -> Action:
    """A step as a run takes it: loss, backward pass, gradient norm, Adam, average, and the loss on the host."""
    config, spec = _spec(["method.name=masked"], _LENGTH, _VOCABULARY, args)
    layout, method = Layout(args.samples, 1, 1, args.samples), build.method(spec)
    engine = Engine(config, build.net(spec), method, layout)
    ema, ordinal = ShardedEma(engine.master_slices(), config.ema.decays), torch.arange(args.samples)
    batch = Batch(0, x_NT, torch.zeros_like(ordinal), ordinal, torch.ones(args.samples))

    def step() -> None:
        result = engine.step([batch], _LR)
        ema.update()
        float(result.loss)

    return step


def plain_step(args: argparse.Namespace, x_NT: Tensor) -> Action:
    """The same net as one would train it without a framework."""
    net = build.net(_spec(["method.name=masked"], _LENGTH, _VOCABULARY, args)[1]).model
    parameters = list(net.parameters())
    averages = [p.detach().clone() for p in parameters]
    optimizer, label = torch.optim.AdamW(parameters, lr=_LR, fused=True), torch.zeros(len(x_NT), dtype=torch.int64)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        t_N1 = torch.rand(len(x_NT), 1).clamp_min(1.0 / _LENGTH)
        masked_NT = torch.rand(x_NT.shape) < t_N1
        h = net(torch.where(masked_NT, _VOCABULARY, x_NT), label)
        nll = F.cross_entropy(
            F.linear(h, net.head.unembed.weight, net.head.unembed.bias).transpose(1, 2), x_NT, reduction="none"
        )
        loss = (nll * masked_NT / t_N1).sum(dim=1).mean()
        loss.backward()
        torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        optimizer.step()
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - _DECAY)
        loss.item()

    return step


def report_training(args: argparse.Namespace) -> None:
    x = torch.randint(_VOCABULARY, (args.samples, _LENGTH), generator=torch.Generator().manual_seed(0))
    ours, plain = seconds([engine_step(args, x), plain_step(args, x)], args.rounds, warm_ups=2)
    print(f"masked, width {args.width}, depth {args.depth}, {args.samples} x {_LENGTH} tokens of {_VOCABULARY}, fp32")
    print(f"  plain loop / our step            {_ratio(plain, ours)}   goal 0.95, steps of {min(ours):.2f} s")


# --- verified decoding ---


def _trained(words: Sequence[str], x_NT: Tensor, args: argparse.Namespace) -> object:
    _, spec = _spec([*_CAUSAL, *words], x_NT.shape[1], 2, args)
    net, method = build.net(spec), build.method(spec)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for step in range(args.train_steps):
        ordinal = step * args.samples + torch.arange(args.samples)
        x = x_NT[torch.from_numpy(np.random.default_rng(step).integers(len(x_NT), size=args.samples))]
        optimizer.zero_grad()
        loss = method.loss(net, Batch(0, x, torch.zeros_like(ordinal), ordinal, torch.ones(args.samples)), 0).loss_G
        loss.mean().backward()
        optimizer.step()
    return net.eval()


def _steps(samples: int) -> Steps:
    index = torch.arange(samples)
    times = torch.tensor([1.0, 0.0], dtype=torch.float64)
    return Steps(times, uniform=lambda stream, count: rng.uniform(0, "tokens", index, count, stream))


def report_verified(args: argparse.Namespace) -> None:
    """Drafts of every kind of head; a sample is drawn alone, as where answers are waited for, or with others."""
    x = torch.from_numpy((load_digits().data >= 8).astype(np.int64))
    single = _trained(["model.block=1"], x, args)
    print(f"digits, width {args.width}, depth {args.depth}, {args.train_steps} steps; drafts of {args.block} tokens")
    print("  head             tokens a pass   one token a pass / verified: 1 sample, 64 samples")
    for kind in ("factorized", "mixture", "autoregressive"):
        more = ["model.head.components=8"] if kind == "mixture" else []
        net = _trained([f"model.block={args.block}", f"model.head.kind={kind}", *more], x, args)
        _, acceptance = decode(net, *_start(x, 256), _steps(256))  # type: ignore[arg-type]
        parts = [_wall(single, net, x, samples, args.rounds) for samples in (1, 64)]
        print(f"  {kind:<16} {acceptance.tokens_a_pass:<15.2f} {'   '.join(parts)}")


def _start(x_NT: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    return torch.full((samples, x_NT.shape[1]), 2), torch.zeros(samples, dtype=torch.int64)


def _wall(single: object, net: object, x_NT: Tensor, samples: int, rounds: int) -> str:
    given = (*_start(x_NT, samples), _steps(samples))
    one, several = seconds([lambda: blocks(single, *given), lambda: decode(net, *given)], rounds)  # type: ignore[arg-type]
    return _ratio(one, several)


def _ratio(above: Sequence[float], below: Sequence[float]) -> str:
    """Median of the ratios round by round, with the smallest and the largest."""
    values = ratios(above, below)
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16, help="of a step")
    parser.add_argument("--block", type=int, default=4)
    parser.add_argument("--train-steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    world.init(world.detect())
    report_training(args)
    report_verified(args)


if __name__ == "__main__":
    main()
