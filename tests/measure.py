"""What a real engine holds, sends and computes: the other side of the planner's figures."""

import contextlib
import gc
import inspect
import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from imm_scale.build import ModelSpec
    from imm_scale.config.schema import Config


_LET_GO = 0.001  # seconds in which a thread of gloo drops what it holds


@contextlib.contextmanager
def collectives() -> Iterator[Counter[str]]:
    """Bytes of the whole tensor of each collective of this rank (the gathered or the reduced one), by its name."""
    import torch.distributed as dist

    sent: Counter[str] = Counter()

    def wrap(function: Any, name: str, whole: str) -> Any:
        signature = inspect.signature(function)

        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            tensor = bound.arguments[whole]
            tensors = tensor if isinstance(tensor, list) else [tensor]
            sent[name] += sum(t.numel() * t.element_size() for t in tensors)
            # What gloo copies through must be freed by this thread: `Allocations` sees no other. So its own goes first.
            asynchronous = bound.arguments.get("async_op", False)
            bound.arguments["async_op"] = True
            work = function(*bound.args, **bound.kwargs)
            if work is not None:
                work.wait()
                time.sleep(_LET_GO)
            return work if asynchronous else None

        return call

    # (function, name, the argument that all ranks have or get)
    table = [
        ("all_reduce", "all_reduce", "tensor"),
        ("reduce", "reduce", "tensor"),
        ("broadcast", "broadcast", "tensor"),
        ("all_gather", "all_gather", "tensor_list"),
        ("all_gather_into_tensor", "all_gather", "output_tensor"),
        ("reduce_scatter", "reduce_scatter", "input_list"),
        ("reduce_scatter_tensor", "reduce_scatter", "input"),
    ]
    originals = {function: getattr(dist, function) for function, _, _ in table}
    try:
        for function, name, whole in table:
            setattr(dist, function, wrap(originals[function], name, whole))
        yield sent
    finally:
        for function, original in originals.items():
            setattr(dist, function, original)


class Allocations:
    """Bytes that torch's CPU allocator holds, from its own events: now and at most, since entering."""

    def __enter__(self) -> "Allocations":
        # No `acc_events`: it makes a Python object of every operation.
        self._profiler = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=False
        )
        self._profiler.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profiler.__exit__(*error)
        held = 0
        self.peak = 0
        self.trace = []
        events = [e for e in self._profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            self.peak = max(self.peak, held)
            self.trace.append(event.nbytes())
        self.held = held


def live_bytes() -> int:
    """Bytes of all storages that Python's tensors hold in this process, uncollected garbage included."""
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


SHAPE = (4, 16, 16)
LATENTS = ["data.codec=pixels", "data.latent_shape=[4,16,16]", "data.num_classes=10"]


def spec_of(config: "Config") -> "ModelSpec":
    """The spec of a config whose data are LATENTS, without any shards."""
    from imm_scale import build
    from imm_scale.data.manifest import Codec, Manifest

    codec = Codec("pixels", "", 16, 4, 1, (0.0,) * 4, (1.0,) * 4)
    return build.model_spec(config, Manifest(codec, SHAPE, 10, (), ()))


def engines(cases: list[list[str]]) -> list[dict[str, Any]]:
    """Builds and steps a real engine for each list of overrides, on this rank; see `_engine` for what comes back.

    One process may serve several: DeepSpeed remembers autocast, so 16-bit cases keep to themselves.
    """
    with collectives() as sent:  # before DeepSpeed takes the functions for its own
        from imm_scale.parallel import world

        world.init(world.detect())
        return [_engine(overrides, sent) for overrides in cases]


def _engine(overrides: list[str], sent: Counter[str]) -> dict[str, Any]:
    """{held: bytes after construction, peak: most bytes in a step, sent: bytes by collective, flops: of a step}."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from imm_scale import build
    from imm_scale import config as configs
    from imm_scale.data.loader import Batch
    from imm_scale.data.sample_order import Layout
    from imm_scale.parallel import world
    from imm_scale.parallel.deepspeed_engine import Engine
    from imm_scale.parallel.ema import ShardedEma

    config = configs.load([], [*LATENTS, *overrides]).config
    layout = Layout(
        config.train.global_batch_size,
        config.method.group_size,
        world.detect().size,
        config.train.micro_batch_size,
    )
    samples = layout.samples_per_micro_batch
    gc.collect()
    with Allocations() as construction:
        flow_map = build.net(spec_of(config))
        objective = build.method(spec_of(config))
        engine = Engine(config, flow_map, objective, layout)
        ema = ShardedEma(engine.master_slices(), config.ema.decays)
        gc.collect()
    n = samples * layout.accumulation
    batch = Batch(
        0, torch.randn(n, *SHAPE), torch.zeros(n, dtype=torch.long), torch.arange(n), torch.ones(layout.slots)
    )
    parts = batch.micro_batches(layout.accumulation)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it misses CPU's fused attention
        engine.step(parts, 1e-4)
    gc.collect()
    sent.clear()
    with Allocations() as step:  # the second step: the first of stage 3 gathers more, to learn the order
        engine.step(parts, 1e-4)
        ema.update()
    engine.close()
    peak = construction.held + step.peak
    return {"held": construction.held, "peak": peak, "sent": dict(sent), "flops": counter.get_total_flops()}
