"""Settings of LCSC and Q-Sched."""

from typing import ClassVar, Literal

from pydantic import Field

from ..settings import Idle, MethodSettings, Origin, Paper, Variant, settings

Space = Literal["weights", "lora_factors", "lora_delta"]


Q_SCHED_PAPER = Paper(
    "Q-Sched",
    "Q-Sched: Pushing the Boundaries of Few-Step Diffusion Models with Quantization-Aware Scheduling",
    "Frumkin, Natalia",
    "2509.01624",
)
LCSC_PAPER = Paper(
    "LCSC",
    "Linear Combination of Saved Checkpoints Makes Consistency and Diffusion Models Better",
    "Liu, Enshu",
    "2404.02241",
)
MWA_PAPER = Paper(
    "MWA",
    "Parameter-Efficient Checkpoint Merging via Metrics-Weighted Averaging",
    "Yu, Shi Jie",
    "2504.18580",
)


@settings
class LCSCSettings(MethodSettings):
    """Weights sum(alpha_i theta_i) with sum(alpha) = 1, of the raw weights that a run kept (raw_weights.every).

    family       evolution: LCSC's search from a population of EMAs; uniform: over the last k checkpoints for each k of
                 `windows`; ema: over `rates`; mwa: weights by `metric`, a candidate for each of `penalties`, no search
    last         use the newest so many checkpoints; null for all
    space        weights; of a LoRA also lora_factors (sum of A and sum of B) or lora_delta (sum of B A)
    rates        rates g of a candidate's average of checkpoints: alpha_1 = g^(K-1), alpha_i = (1-g) g^(K-i)
    windows      numbers k of last checkpoints
    num_parents  best candidates that the evolution goes on from (the paper's value is not public, this is ours)
    sigma        size of a mutation, as a share of the first population's spread; it falls tenfold over the budget
                 (ours)
    probability  probability of a mutation, for each entry (ours)
    metric       mwa: mean training loss since the checkpoint before, or the step
    weighting    mwa: power, w ~ loss^-p or step^p; softmax, w ~ exp(-p (loss - min) / (max - min)). After
                 MWA's idea, not its formula
    penalties    mwa: the powers p
    """

    family: Literal["evolution", "uniform", "ema", "mwa"] = "evolution"
    last: int | None = Field(None, ge=2)
    space: Space = "weights"
    rates: tuple[float, ...] = (0.0, 0.3, 0.5, 0.7, 0.9, 0.95, 0.97, 0.99)
    windows: tuple[int, ...] = (2, 4, 8, 16)
    num_parents: int = Field(10, ge=2)
    sigma: float = Field(0.5, gt=0)
    probability: float = Field(0.5, gt=0, le=1)
    metric: Literal["loss", "step"] = "loss"
    weighting: Literal["power", "softmax"] = "power"
    penalties: tuple[float, ...] = (2.0,)

    idea: ClassVar[str] = "the best combination of a run's checkpoints"
    origin: ClassVar[Origin | None] = Origin(
        "search", LCSC_PAPER, (Variant("method.family", "mwa", MWA_PAPER),)
    )
    idle: ClassVar[tuple[Idle, ...]] = (
        Idle("method.num_parents method.sigma method.probability", "method.family", only=("evolution",)),
        Idle("method.rates", "method.family", only=("evolution", "ema")),
        Idle("method.windows", "method.family", only=("uniform",)),
        Idle("method.metric method.weighting method.penalties", "method.family", only=("mwa",)),
    )


@settings
class QSchedSettings(MethodSettings):
    """Each step multiplies the network's output by c_eps and the state by c_x.

    quantisation  w8a8, w4a8, w8, w4 or the like: bits of weights (2 to 8) and activations; null: the unquantised
                  student alone
    convolutions  quantise them too, by fake quantisation
    family        constant: one pair for all steps; ramp_to_one: linear, 1 at the last step (the official search); ramp:
                  linear between two pairs (the official evaluation); free: a pair a step
    strategy      grid: `points` values on each axis; evolution: from the best so far
    c_eps         range of the grid, and of the first candidates of the evolution
    c_x           range of the state's factor, likewise
    points        values of the grid on each axis
    num_parents   best candidates that the evolution goes on from
    sigma         size of a mutation, as a share of the range; halves until the budget is spent
    control       search the unquantised student too: its gain is not one over the quantisation
    """

    quantisation: str | None = "w4a8"
    convolutions: bool = True
    family: Literal["constant", "ramp_to_one", "ramp", "free"] = "ramp_to_one"
    strategy: Literal["grid", "evolution"] = "grid"
    c_eps: tuple[float, float] = (0.8, 1.1)
    c_x: tuple[float, float] = (0.8, 1.1)
    points: int = Field(10, ge=1)
    num_parents: int = Field(10, ge=2)
    sigma: float = Field(0.1, gt=0)
    control: bool = True

    idea: ClassVar[str] = "two factors a step that suit the schedule to quantised weights"
    origin: ClassVar[Origin | None] = Origin("search", Q_SCHED_PAPER)
    idle: ClassVar[tuple[Idle, ...]] = (
        Idle("method.convolutions method.control", "method.quantisation", values=(None,)),
        Idle("method.points", "method.strategy", only=("grid",)),
        Idle("method.num_parents method.sigma", "method.strategy", only=("evolution",)),
    )
