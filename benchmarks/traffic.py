"""Bytes that the collectives of torch.distributed carry, counted where they are called."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

# Which argument of a collective is the whole of what is gathered or reduced: its position, its names.
_Whole = tuple[int, tuple[str, ...]]
_GATHERS: dict[str, _Whole] = dict.fromkeys(
    ("all_gather_into_tensor", "all_gather"), (0, ("output_tensor", "tensor_list"))
)
_SCATTERS: dict[str, _Whole] = dict.fromkeys(("reduce_scatter_tensor", "reduce_scatter"), (1, ("input", "input_list")))
_OTHERS: dict[str, _Whole] = {
    **dict.fromkeys(("all_reduce", "broadcast", "reduce", "gather"), (0, ("tensor",))),
    **dict.fromkeys(("all_to_all_single", "all_to_all"), (1, ("input", "input_tensor_list"))),
}


def listen() -> Counter[str]:
    """Counts from now on, by `gather`, `scatter` and `other`; call it before anybody takes hold of the functions."""
    counts: Counter[str] = Counter()
    for kind, functions in (("gather", _GATHERS), ("scatter", _SCATTERS), ("other", _OTHERS)):
        for name, (position, keywords) in functions.items():
            setattr(dist, name, _counting(getattr(dist, name), counts, kind, position, keywords))
    return counts


def _bytes(value: Any) -> int:
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else value.numel() * value.element_size()


def _counting(
    function: Callable[..., Any], counts: Counter[str], kind: str, position: int, keywords: tuple[str, ...]
) -> Callable[..., Any]:
    def counted(*args: Any, **options: Any) -> Any:
        by_keyword = [options[keyword] for keyword in keywords if keyword in options]
        counts[kind] += _bytes(args[position] if len(args) > position else by_keyword[0])
        return function(*args, **options)

    return counted
