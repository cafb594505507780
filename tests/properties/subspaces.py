"""Random settings of transformations inside a subspace, and what they exclude."""

import inspect

import optax
from hypothesis import strategies as st

import flora_jax as fj

OBLIVIOUS = (
    None,
    fj.CountSketch(),
    fj.CountSketch("unbiased"),
    fj.CountSketch("isometric"),
    fj.Gaussian(),
    fj.Rademacher(),
    fj.Orthogonal(),
    fj.Orthogonal("isometric"),
    fj.SRHT("unbiased"),
    fj.SRHT("isometric"),
)
ADAPTIVE = (
    fj.TopSVD(method="exact"),
    fj.TopSVD(),
    fj.TopDCT(),
    fj.TopDCT(norm="l2"),
)
RESIDUALS = (
    None,
    fj.Plain(),
    *(
        kind(limiter, norms, 0.5, 0.9)
        for kind in (fj.Fira, fj.FiraCode, fj.Apollo)
        for limiter in (1.01, None)
        for norms in ("channel", "tensor")
    ),
)
TRANSPORTS = (
    fj.Keep(),
    fj.Squared(),
    fj.LDAdam(0.5, 0.9),
    fj.PreserveRMS(),
    fj.Reset(0.5, 0.9),
)
# What each recipe fixes of scale_in_subspace, where its own arguments do not say.
FIXED = {
    fj.galore: {"transport": fj.Keep(), "residual": None},
    fj.fira: {"transport": fj.Keep()},
    fj.apollo: {"transport": fj.Keep()},
    fj.apollo_mini: {"transport": fj.Keep()},
    fj.dct_adamw: {"transport": fj.Squared(), "residual": None},
    fj.flora_adamw: {},
    fj.flora_muon: {},
}


def choose(draw, **options):
    return {name: draw(st.sampled_from(values)) for name, values in options.items()}


def is_isometric(projection, factory):
    """Whether a projection has orthonormal rows, given what a recipe fills in."""
    if projection is None:
        return factory not in (fj.apollo, fj.apollo_mini)
    if projection.normalization is None:
        return is_isometric(None, factory)
    return projection.normalization == "isometric"


def adamw(draw, factory):
    """A recipe of the family, most often with a projection that suits it."""
    known = inspect.signature(factory).parameters
    of_apollo = factory in (fj.apollo, fj.apollo_mini)
    wide = OBLIVIOUS + ADAPTIVE
    suited = tuple(p for p in wide if is_isometric(p, factory))
    if factory is fj.galore or of_apollo:
        suited = wide
    scaled = tuple(
        x
        for x in RESIDUALS
        if isinstance(x, fj.Fira) and isinstance(x, fj.Apollo) == of_apollo
    )
    options = {
        "learning_rate": (0.1, optax.linear_schedule(0.1, 0.0, 3)),
        "refresh_every": (None, 1, 2, 4),
        "stagger": (True, False),
        "weight_decay": (None, 0.01),
        "state_dtype": (None, "int8"),
        "transport": TRANSPORTS,
        "residual": scaled,
        "error_feedback": (True, False),
    }
    arguments = choose(draw, **{k: v for k, v in options.items() if k in known})
    sketch = choose(draw, projection=suited * 4 + wide)
    settings = {"error_feedback": False, **FIXED[factory], **arguments, **sketch}
    return arguments, sketch, excluded(factory, settings)


def subspace(draw):
    adam = draw(st.booleans())
    decays = TRANSPORTS if adam else (fj.Keep(), fj.Squared(), fj.LDAdam(), fj.Reset())
    arguments = {
        "inner": optax.scale_by_adam(0.5, 0.9) if adam else optax.trace(0.5),
        **choose(
            draw,
            refresh_every=(None, 1, 2, 4),
            transport=decays,
            residual=RESIDUALS,
            stagger=(True, False),
        ),
    }
    if arguments["residual"] is None:
        arguments["error_feedback"] = draw(st.booleans())
    # An exclusion that is rare enough to be tried on top.
    arguments |= draw(st.sampled_from([{}] * 18 + [{"error_feedback": True}]))
    sketch = choose(draw, projection=OBLIVIOUS + ADAPTIVE)
    settings = {"error_feedback": False, **arguments, **sketch}
    return arguments, sketch, excluded(fj.scale_in_subspace, settings)


def excluded(factory, settings):
    """Why settings of a subspace exclude each other, as its documentation says."""
    projection, residual = settings["projection"], settings["residual"]
    transport, reasons = settings["transport"], []
    if settings["error_feedback"] and residual is not None:
        reasons += ["`error_feedback` keeps what the update leaves out"]
    if not is_isometric(projection, factory):
        wants = {
            "residual": not isinstance(residual, fj.Apollo | None),
            "transport": not isinstance(transport, fj.Reset) and transport != fj.Keep(),
            "error_feedback": settings["error_feedback"],
        }
        needs = "needs a projection with orthonormal rows"
        reasons += [f"`{name}`.* {needs}" for name, wanted in wants.items() if wanted]
    if isinstance(transport, fj.PreserveRMS) and projection in ADAPTIVE:
        reasons += ["`transport` PreserveRMS.* is for bases that a key regenerates"]
    if transport == fj.LDAdam():
        reasons += ["`transport` LDAdam needs the decays of `inner`"]
    return reasons
