"""Random settings of transformations inside a subspace, and what they exclude."""

import inspect

import optax
from hypothesis import strategies as st

import flora_jax as fj

OBLIVIOUS = (
    fj.CountSketch(),
    fj.CountSketch(scale="isometric"),
    fj.Gaussian(),
    fj.Rademacher(),
    fj.Orthogonal(),
    fj.Orthogonal(scale="isometric"),
    fj.SRHT(),
    fj.SRHT(scale="isometric"),
)
ADAPTIVE = (
    fj.TopSVD(),
    fj.TopSVD(method="randomized"),
    fj.TopDCT(),
    fj.TopDCT(norm="l2"),
)
RESIDUALS = ("dropped", "plain", "fira", "fira_code", "apollo")
# What each recipe fixes of scale_in_subspace, where its own arguments do not say.
FIXED = {
    fj.galore: {"transport": "keep", "residual": "dropped", "limiter": None},
    fj.fira: {"transport": "keep"},
    fj.apollo: {"transport": "keep", "residual": "apollo"},
    fj.apollo_mini: {"transport": "keep", "residual": "apollo"},
    fj.dct_adamw: {"transport": "squared", "residual": "dropped", "limiter": None},
    fj.flora_adamw: {},
}


def choose(draw, **options):
    return {name: draw(st.sampled_from(values)) for name, values in options.items()}


def adamw(draw, factory):
    """A recipe of the family, most often with a projection that suits it."""
    known = inspect.signature(factory).parameters
    wide = OBLIVIOUS + ADAPTIVE
    suited = tuple(p for p in wide if p.scale == "isometric")
    if factory in (fj.galore, fj.apollo, fj.apollo_mini):
        suited = wide
    options = {
        "learning_rate": (0.1, optax.linear_schedule(0.1, 0.0, 3)),
        "projection": suited * 4 + wide,
        "refresh_every": (None, 1, 2, 4),
        "stagger": (True, False),
        "weight_decay": (None, 0.01),
        "state_dtype": (None, "int8"),
        "transport": ("keep", "squared", "ldadam", "rms", "reset"),
        "residual": ("fira", "fira_code"),
        "norms": ("channel", "tensor"),
        "limiter": (1.01, None),
        "error_feedback": (True, False),
    }
    arguments = choose(draw, **{k: v for k, v in options.items() if k in known})
    settings = {"betas": (), "error_feedback": False, **FIXED[factory], **arguments}
    return arguments, excluded(settings)


def subspace(draw):
    adam = draw(st.booleans())
    arguments = {
        "inner": optax.scale_by_adam(0.5, 0.9) if adam else optax.trace(0.5),
        "betas": draw(st.sampled_from([(0.5, 0.9), None])) if adam else None,
        **choose(
            draw,
            projection=OBLIVIOUS + ADAPTIVE,
            refresh_every=(None, 1, 2, 4),
            transport=("keep", "squared", "ldadam", "rms", "reset"),
            residual=RESIDUALS,
            norms=("channel", "tensor"),
            stagger=(True, False),
        ),
    }
    limited = arguments["residual"] not in ("dropped", "plain")
    arguments["limiter"] = draw(st.sampled_from([1.01, None] if limited else [None]))
    if arguments["residual"] == "dropped":
        arguments["error_feedback"] = draw(st.booleans())
    # Exclusions that are rare enough to be tried on top.
    arguments |= draw(
        st.sampled_from([{}] * 18 + [{"limiter": 1.01}, {"error_feedback": True}])
    )
    settings = {"error_feedback": False, **arguments}
    return arguments, excluded(settings)


def excluded(settings):
    """Why settings of a subspace exclude each other, as its documentation says."""
    projection, residual = settings["projection"], settings["residual"]
    transport, reasons = settings["transport"], []
    if settings["limiter"] is not None and residual in ("dropped", "plain"):
        reasons += ["`limiter` limits a scaled residual"]
    if settings["error_feedback"] and residual != "dropped":
        reasons += ["`error_feedback` keeps what the update leaves out"]
    if projection.scale != "isometric":
        wants = {
            "residual": residual not in ("dropped", "apollo"),
            "transport": transport not in ("keep", "reset"),
            "error_feedback": settings["error_feedback"],
        }
        needs = "needs a projection with orthonormal rows"
        reasons += [f"`{name}` .* {needs}" for name, wanted in wants.items() if wanted]
    if transport == "rms" and projection in ADAPTIVE:
        reasons += ["`transport` 'rms' is for bases that are drawn anew"]
    if transport == "ldadam" and settings["betas"] is None:
        reasons += ["`betas` must be given for transport='ldadam'"]
    return reasons
