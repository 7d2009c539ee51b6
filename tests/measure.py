"""What a real engine holds, sends and computes: the other side of the planner's figures."""

import contextlib
import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def collectives() -> Iterator[Counter[str]]:
    """Bytes of the whole tensor of each collective of this rank (the gathered or the reduced one), by its name."""
    import torch.distributed as dist

    sent: Counter[str] = Counter()

    def wrap(function: Any, name: str, whole: str) -> Any:
        signature = inspect.signature(function)

        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = signature.bind(*args, **kwargs).arguments[whole]
            tensors = tensor if isinstance(tensor, list) else [tensor]
            sent[name] += sum(t.numel() * t.element_size() for t in tensors)
            return function(*args, **kwargs)

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
    kept = {function: getattr(dist, function) for function, _, _ in table}
    try:
        for function, name, whole in table:
            setattr(dist, function, wrap(kept[function], name, whole))
        yield sent
    finally:
        for function, original in kept.items():
            setattr(dist, function, original)


class Allocations:
    """Bytes that torch's CPU allocator holds, from its own events: now and at most, since entering."""

    def __enter__(self) -> "Allocations":
        self._profiler = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
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
