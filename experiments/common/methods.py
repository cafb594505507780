"""The methods that are compared: the one list that every command reads.

A new method is one entry of `METHODS`. Command lines read its name before anything
heavy is needed, so that `--help` and a refused setting answer at once: optax, jax and
flora_jax are imported when the first optimizer is made.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import jax
    import optax

    import flora_jax as fj


class _OnUse:
    """A module that is imported when something of it is asked for."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


if not TYPE_CHECKING:
    fj, jax, optax = _OnUse("flora_jax"), _OnUse("jax"), _OnUse("optax")

Base = Literal["adafactor", "adam", "sgd"]
Kind = Literal["momentum", "accumulation", "none"]
PROJECTIONS = ("CountSketch", "Gaussian", "Rademacher", "Orthogonal", "SRHT")
Loss = Callable[..., "jax.Array"]  # A scalar, differentiated in its first argument.


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run sets besides the learning rate; each method reads what it uses.

    Attributes:
        sketch: of momentum, accumulator or gradients, or its rank.
        base: the optimizer whose gradients or momentum are kept.
        micro_batches: calls in one cycle of an accumulation.
        b1: decay of the momentum.
        b2: decay of the second moment, where it is Adam's.
        refresh_every: updates between two projections; None keeps the first.
        estimator: of a sketched momentum.
        options: further arguments of the recipe, by name, which replace what is shared.
    """

    sketch: "fj.Sketch | int" = 1
    base: Base = "adafactor"
    micro_batches: int = 1
    b1: float = 0.9
    b2: float = 0.999
    refresh_every: int | None = 200
    estimator: str = "paper"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of a table: an optimizer, and what it keeps.

    Attributes:
        name: as on the command line.
        title: as in tables.
        make: from a learning rate, or a schedule of it, and the settings.
        kind: what it keeps besides second moments: the buffer that tables are about.
        keeps: how: as it is, as a sketch, as a sketch of gradients that are sketched
            during backpropagation, or of LoRA's adapters in place of the matrices.
        base: its base optimizer, unless that is for the run to choose.
        options: as in `Settings`; those of the run come first.
    """

    name: str
    title: str
    make: "Callable[[optax.ScalarOrSchedule, Settings], Any]"
    kind: Kind = "none"
    keeps: Literal["full", "sketch", "sketched gradients", "adapters"] = "full"
    base: Base | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def ranked(self) -> bool:
        """Whether a rank is chosen."""
        return self.keeps != "full"

    @property
    def adapters(self) -> bool:
        """Whether LoRA's adapters are trained."""
        return self.keeps == "adapters"

    @property
    def compressed(self) -> bool:
        """Whether the buffer is a sketch."""
        return self.ranked and not self.adapters

    @property
    def sketched_gradients(self) -> bool:
        """Whether gradients are sketched during backpropagation."""
        return self.keeps == "sketched gradients"

    @property
    def buffer(self) -> str:
        """Name of the buffer in the optimizer's state."""
        if self.kind == "accumulation":
            return "acc_grads"
        return "momentum" if self.compressed else "ema"

    def micro_batches(self, config: Any) -> int:
        """Returns the number of parts in which an update sees its batch."""
        return config.micro_batches if self.kind == "accumulation" else 1

    def value_and_grad(
        self, loss: Loss, sketch: "fj.Sketch", state: Any, *arguments: Any
    ) -> tuple[Any, Any]:
        """Returns a loss, and what the optimizer takes as its gradient.

        Args:
            loss: of the arguments.
            sketch: of the gradients, where backpropagation sketches them.
            state: the optimizer's.
            *arguments: of the loss.
        """
        if not self.sketched_gradients:
            return jax.value_and_grad(loss)(*arguments)
        return fj.sketched_value_and_grad(loss, sketch)(state, *arguments)

    def optimizer(
        self, learning_rate: "optax.ScalarOrSchedule", settings: Settings
    ) -> "optax.GradientTransformationExtraArgs":
        """Returns the optimizer."""
        if self.base is not None:
            settings = dataclasses.replace(settings, base=self.base)
        options = {**self.options, **settings.options}
        return self.make(learning_rate, with_options(settings, options))


def settings_of(
    config: Any, rank: int | None, seed: int | None = None, **changes: Any
) -> Settings:
    """Returns what the settings of a pretraining or a fine-tuning say of a method.

    Args:
        config: of either.
        rank: None where no rank is chosen.
        seed: of the projections, in place of the one of `config`.
        **changes: fields of which `config` says nothing.
    """
    key = config.seed if seed is None else seed
    sketch = fj.Sketch(
        rank or 1, built(config.projection), key=key, mask=fj.not_embeddings
    )
    settings = Settings(
        sketch=sketch,
        base=config.optimizer,
        micro_batches=config.micro_batches,
        b1=config.momentum,
        refresh_every=config.resample_every,
        estimator=config.estimator,
    )
    return dataclasses.replace(settings, **changes)


def with_options(settings: Settings, options: Mapping[str, Any]) -> Settings:
    """Returns the settings with options that belong to the sketch moved into it.

    Objects are written as in JSON: `"SRHT"`, `{"Fira": {"limiter": null}}`.
    """
    fields = {field.name for field in dataclasses.fields(fj.Sketch)}
    of_sketch, others = {}, {}
    for name, value in options.items():
        if name in fields:
            of_sketch[name] = built(value)
        else:
            others[name] = built(value)
    sketch = settings.sketch
    sketch = fj.Sketch(sketch) if isinstance(sketch, int) else sketch
    sketch = dataclasses.replace(sketch, **of_sketch)
    return dataclasses.replace(settings, sketch=sketch, options=others)


def built(value: Any) -> Any:
    """Returns flora_jax's object of a name, or of {name: arguments}; all else as is."""
    if isinstance(value, str) and value[:1].isupper():
        return getattr(fj, value)()
    if isinstance(value, dict):
        ((name, arguments),) = value.items()
        return getattr(fj, name)(**arguments)
    return value


def matrices(params: Any) -> Any:
    """Returns whether each parameter is one that sketches are taken of."""
    plans = fj.plan_leaves(params, fj.Sketch(1, mask=fj.not_embeddings))
    return jax.tree.map(lambda plan: plan.dense_reason is None, plans)


def base_optimizer(learning_rate: Any, s: Settings) -> Any:
    """Returns the base optimizer; Adam's own momentum is not what is compared."""
    own = {"b1": s.b1} if s.base == "adam" else {}
    return getattr(optax, s.base)(learning_rate, **own)


def _ema(learning_rate: Any, s: Settings) -> Any:
    if s.base == "adafactor":
        return optax.adafactor(learning_rate, momentum=s.b1)
    return _averaged(optax.ema(s.b1, debias=False), learning_rate, s)


def _momentum(learning_rate: Any, s: Settings) -> Any:
    own = {"resample_every": s.refresh_every, "estimator": s.estimator} | s.options
    if s.base == "adafactor":
        return fj.flora(learning_rate, s.sketch, **{"b1": s.b1} | own)
    return _averaged(fj.compressed_momentum(s.b1, s.sketch, **own), learning_rate, s)


def _averaged(momentum: Any, learning_rate: Any, s: Settings) -> Any:
    if s.base == "adam":
        raise ValueError(
            "`base` must be adafactor or sgd for a method with a momentum, got 'adam', "
            "which has one of its own"
        )
    return optax.chain(momentum, optax.scale_by_learning_rate(learning_rate))


def _steps(learning_rate: Any, s: Settings) -> Any:
    steps = optax.MultiSteps(base_optimizer(learning_rate, s), s.micro_batches)
    return steps.gradient_transformation()


def _accumulation(learning_rate: Any, s: Settings) -> Any:
    base = base_optimizer(learning_rate, s)
    return fj.compressed_accumulation(base, s.micro_batches, s.sketch)


def _recipe(recipe: str, **fixed: Any) -> Callable[[Any, Settings], Any]:
    """A recipe of flora_jax that has Adam's second moment and renews its basis."""

    def make(learning_rate: Any, s: Settings) -> Any:
        # DCT-AdamW's bases cost so little that each update has its own.
        every = 1 if recipe == "dct_adamw" else s.refresh_every
        own = {"b2": s.b2, "refresh_every": every} | fixed | s.options
        return getattr(fj, recipe)(learning_rate, s.sketch, **own)

    return make


def _apollo_mini(learning_rate: Any, s: Settings) -> Any:
    sketch = dataclasses.replace(s.sketch, rank=1)  # Its rank is not the run's to set.
    settings = dataclasses.replace(s, sketch=sketch)
    return _recipe("apollo_mini")(learning_rate, settings)


def _flora_muon(learning_rate: Any, s: Settings) -> Any:
    own = {"refresh_every": s.refresh_every} | s.options
    if own.pop("nesterov", True):
        return fj.flora_muon(learning_rate, s.sketch, **own)
    # Its matrices without Nesterov's look-ahead, for an ablation.
    every, residual = own["refresh_every"], fj.Fira()
    momentum = fj.scale_in_subspace(
        optax.trace(0.95), s.sketch, every, residual=residual, transport=fj.Squared()
    )
    return _orthogonalized(_coded(momentum, s), learning_rate, s)


def _adamw(learning_rate: Any, s: Settings) -> Any:
    return _coded(optax.adamw(learning_rate, b2=s.b2, weight_decay=0.0), s)


def _muon(learning_rate: Any, s: Settings) -> Any:
    """Muon for the matrices that others sketch, Adam for all else.

    Its update has the size of Adam's (consistent_rms = 0.2), as its authors advise
    where the two share a learning rate.
    """

    def spec(plan: "fj.LeafPlan") -> Any:
        axes = plan.row_axes, plan.column_axes
        return None if plan.dense_reason else optax.contrib.MuonDimensionNumbers(*axes)

    def specs(params: Any) -> Any:
        sketch = dataclasses.replace(s.sketch, rank=1)
        return jax.tree.map(spec, fj.plan_leaves(params, sketch))

    tx = optax.contrib.muon(
        learning_rate,
        adam_b2=s.b2,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=specs,
    )
    return _coded(tx, s)


def _coded(tx: Any, s: Settings) -> Any:
    dtype = s.options.get("state_dtype")
    return tx if dtype is None else fj.quantize_state(tx, dtype)


def _orthogonalized(momentum: Any, learning_rate: Any, s: Settings) -> Any:
    """Muon's step."""
    rules = fj.LeafRules(mask=s.sketch.mask)
    step = optax.scale_by_learning_rate(learning_rate)
    return optax.chain(momentum, fj.orthogonalize(rules=rules), step)


def _adamw_orthogonal(learning_rate: Any, s: Settings) -> Any:
    return _orthogonalized(optax.scale_by_adam(b2=s.b2), learning_rate, s)


def _sketched_muon(learning_rate: Any, s: Settings) -> Any:
    momentum = fj.compressed_momentum(
        0.95, s.sketch, resample_every=s.refresh_every, estimator="nesterov"
    )
    return _orthogonalized(momentum, learning_rate, s)


def _optax_galore(learning_rate: Any, s: Settings) -> Any:
    rank, every = s.sketch.rank, s.refresh_every
    return optax.contrib.galore(learning_rate, rank=rank, update_proj_gap=every)


_ACC, _MOM = "accumulation", "momentum"
_SKETCHED = "FLORA accumulation, sketched gradients"

# What is kept of the gradients of a base optimizer that the run chooses.
_OF_A_BASE = (
    Method("none", "No accumulation", base_optimizer),
    Method("full_accumulation", "Full accumulation", _steps, _ACC),
    Method("flora_accumulation", "FLORA accumulation", _accumulation, _ACC, "sketch"),
    Method(
        "sketched_accumulation", _SKETCHED, _accumulation, _ACC, "sketched gradients"
    ),
    Method("lora_accumulation", "LoRA accumulation", _steps, _ACC, "adapters"),
    Method("full_momentum", "Full momentum", _ema, _MOM),
    Method("flora_momentum", "FLORA momentum", _momentum, _MOM, "sketch"),
    Method("lora_momentum", "LoRA momentum", _ema, _MOM, "adapters"),
)
# Complete optimizers, without weight decay.
_COMPLETE = (
    Method("sgd", "SGD", base_optimizer, base="sgd"),
    Method("adam", "Adam", base_optimizer, base="adam"),
    Method("adamw", "AdamW", _adamw),
    Method("adamw_orthogonal", "AdamW, orthogonalized", _adamw_orthogonal),
    Method("adafactor", "Adafactor", base_optimizer, base="adafactor"),
    Method(
        "adafactor_momentum", "Adafactor + momentum", _ema, _MOM, "full", "adafactor"
    ),
    Method("muon", "Muon", _muon),
    Method("optax_galore", "GaLore of optax", _optax_galore, keeps="sketch"),
    Method("flora", "FLORA", _momentum, _MOM, "sketch", "adafactor"),
    Method("galore", "GaLore", _recipe("galore"), keeps="sketch"),
    Method("fira", "Fira", _recipe("fira"), keeps="sketch"),
    Method("apollo", "APOLLO", _recipe("apollo"), keeps="sketch"),
    Method("apollo_mini", "APOLLO-Mini", _apollo_mini),
    Method("dct_adamw", "DCT-AdamW", _recipe("dct_adamw"), keeps="sketch"),
    Method("flora_adamw", "AdamW on sketches", _recipe("flora_adamw"), keeps="sketch"),
    Method(
        "flora_adamw_int8",
        "AdamW on sketches, int8",
        _recipe("flora_adamw", state_dtype="int8"),
        keeps="sketch",
    ),
    Method("flora_muon", "FLORA-Muon", _flora_muon, keeps="sketch"),
    Method("sketched_muon", "Muon, sketched", _sketched_muon, keeps="sketch"),
)
_INT8 = {"state_dtype": "int8"}
# Complete ones with options, as a grid of a sweep states them.
_VARIANTS = (
    Method("adamw_int8", "AdamW, int8", _adamw, options=_INT8),
    Method("lora_adamw", "LoRA", _adamw, keeps="adapters"),
    Method(
        "flora_muon_rows",
        "FLORA-Muon, row-normalized",
        _flora_muon,
        keeps="sketch",
        options={"method": "RowNormalization"},
    ),
    Method(
        "flora_muon_bfloat16",
        "FLORA-Muon, iterates in bfloat16",
        _flora_muon,
        keeps="sketch",
        options={"method": {"NewtonSchulz": {"dtype": "bfloat16"}}},
    ),
    *(
        Method(
            f"flora_{name.lower()}",
            f"FLORA, {name}",
            _momentum,
            _MOM,
            "sketch",
            "adafactor",
            {"projection": name},
        )
        for name in ("Gaussian", "Rademacher", "Orthogonal", "SRHT")
    ),
    *(
        Method(
            f"flora_{name}",
            f"FLORA, estimator {name}",
            _momentum,
            _MOM,
            "sketch",
            "adafactor",
            {"estimator": name},
        )
        for name in ("paper", "fresh", "residual")
    ),
    Method(
        "galore_exact",
        "GaLore, exact decomposition",
        _recipe("galore"),
        keeps="sketch",
        options={"projection": {"TopSVD": {"method": "exact"}}},
    ),
)
METHODS = {method.name: method for method in (*_OF_A_BASE, *_COMPLETE, *_VARIANTS)}

# Methods of the main job: two uncompressed ones, each with its compressed peer.
MAIN = ("full_momentum", "flora_momentum", "full_accumulation", "flora_accumulation")

# Methods of a fine-tuning: the rows of the paper's tables.
FINETUNE = tuple(method.name for method in _OF_A_BASE)
