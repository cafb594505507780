"""What the settings of a subspace exclude."""

from __future__ import annotations

from typing import Any

from flora_jax import _validation as _checks
from flora_jax.subspace.basis import Subspace
from flora_jax.subspace.residuals import NORMS, RESIDUALS
from flora_jax.subspace.transports import TRANSPORTS


def check_subspace(
    subspace: Subspace,
    residual: str,
    norms: str,
    limiter: Any,
    scale: Any,
    betas: Any,
    error_feedback: bool,
) -> None:
    """Raises on settings that are out of range, or that exclude each other."""
    _checks.check_choice("transport", subspace.transport, TRANSPORTS)
    _checks.check_choice("residual", residual, RESIDUALS)
    _checks.check_choice("norms", norms, NORMS)
    _checks.check_bool("stagger", subspace.stagger)
    _checks.check_bool("error_feedback", error_feedback)
    _check_numbers(limiter, scale, betas)
    projection = subspace.projection
    if limiter is not None and residual in ("dropped", "plain"):
        raise ValueError(
            f"`limiter` limits a scaled residual, got limiter={limiter} with"
            f" residual={residual!r}; use None, or residual='fira'"
        )
    if error_feedback and residual != "dropped":
        raise ValueError(
            "`error_feedback` keeps what the update leaves out, got"
            f" residual={residual!r}, which leaves out nothing; use 'dropped'"
        )
    wants = {
        "residual": residual not in ("dropped", "apollo") and residual,
        "transport": subspace.transport not in ("keep", "reset") and subspace.transport,
        "error_feedback": error_feedback,
    }
    for name, value in wants.items():
        if value and projection.scale != "isometric":
            raise ValueError(
                f"`{name}` {value!r} needs a projection with orthonormal rows, got"
                f" {projection}; use CountSketch(scale='isometric')"
            )
    if subspace.transport == "rms" and subspace.adaptive:
        raise ValueError(
            "`transport` 'rms' is for bases that are drawn anew, got"
            f" {projection}, whose moments it would inflate; use 'squared' or 'ldadam'"
        )
    if subspace.transport == "ldadam" and betas is None:
        raise ValueError(
            "`betas` must be given for transport='ldadam', got betas=None; pass the"
            " decays of `inner`, such as (0.9, 0.999)"
        )


def _check_numbers(limiter: Any, scale: Any, betas: Any) -> None:
    _checks.check_number("scale", scale, 0, None, "0.25 is GaLore's")
    if betas is not None and not (isinstance(betas, tuple) and len(betas) == 2):
        raise TypeError(
            f"`betas` must be a pair of decays, got betas={betas!r}; pass (0.9, 0.999),"
            " or None for an `inner` that does not debias"
        )
    for beta in betas or ():
        _checks.check_number("betas", beta, 0, 1, "(0.9, 0.999) are Adam's")
    if limiter is not None:
        _checks.check_number("limiter", limiter, 1e-30, None, "1.01, or None for none")
