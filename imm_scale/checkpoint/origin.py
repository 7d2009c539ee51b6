"""Which weights an export holds, as it says itself."""

from dataclasses import dataclass

from imm_scale.errors import UserError


@dataclass(frozen=True)
class Origin:
    """Which weights an export holds; None is what it does not say, as one of imported weights or of version 0.1.

    Attributes:
        run: name of the run.
        step, images_seen: of the checkpoint.
        ema: decay of the moving average, 0 for the raw weights.
        width: relative width of an average made of several (`post_hoc_ema.py`), which has no decay.
    """

    run: str | None = None
    step: int | None = None
    images_seen: int | None = None
    ema: float | None = None
    width: float | None = None

    def check(self, source: str, ema: float | None, step: int | None) -> None:
        """Raises UserError where another average or step is asked for than the one there is; None asks for none."""
        if ema is not None and self.width is not None:
            raise UserError(
                f"{source} holds the average of relative width {self.width!r} alone, none of decay {ema!r}: leave it "
                "out, or name the run"
            )
        for name, wanted, held in (("average", ema, self.ema), ("step", step, self.step)):
            if wanted is not None and held is None:
                raise UserError(f"{source} does not say which {name} it holds, {wanted!r} was asked for: leave it out")
            if wanted is not None and wanted != held:
                raise UserError(
                    f"{source} holds weights of {name} {held!r} alone, not of {wanted!r}: leave it out, or name the run"
                )
