"""Flow maps by the Eulerian identity, with a tangent or by differences."""

from imm_scale.methods.eulerian.method import Eulerian, EulerianConfig

__all__ = ["Eulerian", "EulerianConfig"]
