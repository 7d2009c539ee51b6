"""Few-step image generators trained by Inductive Moment Matching (arXiv 2503.07565).

What is named here is the public Python surface; its names and signatures are kept. Each is imported when it is first
used, so that `import imm_scale` costs no torch.
"""

from typing import TYPE_CHECKING

from imm_scale.errors import UserError

if TYPE_CHECKING:
    from imm_scale.api import evaluate, load, sample, train
    from imm_scale.registry import register_backbone, register_method, register_metric, register_space

    __version__: str
else:

    def __getattr__(name: str) -> object:
        """PEP 562: a public name on its first use."""
        from importlib import import_module, metadata

        if name == "__version__":
            try:
                value = metadata.version("imm-scale")
            except metadata.PackageNotFoundError:  # a checkout, used from its folder
                value = "unknown"
        elif name in __all__:
            home = "imm_scale.registry" if name.startswith("register_") else "imm_scale.api"
            value = getattr(import_module(home), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals().setdefault(name, value)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "UserError",
    "__version__",
    "evaluate",
    "load",
    "register_backbone",
    "register_method",
    "register_metric",
    "register_space",
    "sample",
    "train",
]
