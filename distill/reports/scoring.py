"""The scores of one set of pictures: from features to numbers with their protocol."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..metrics.extractor import Extractor
from ..metrics.frechet import INFINITY_RATIO, frechet_infinity
from ..metrics.inception import frechet_label
from ..metrics.kid import DEFINITION as KID_DEFINITION
from ..metrics.kid import within
from ..metrics.manifold import COVERAGE_NEIGHBOURS, PRECISION_NEIGHBOURS, manifold
from ..metrics.neighbours import Share, match_share, neighbour_ratio
from ..metrics.protocol import Protocol, Score
from ..metrics.reference import Reference
from ..scorers.image_text import Measure, Scorer, image_text_protocol
from .conditions import Conditions
from .inputs import Inputs

DEFINITIONS = {
    "KID": KID_DEFINITION,
    "FD": "squared Frechet distance of Gaussians, ddof 1, float64; falls as n_gen grows",
    "FD-infinity": "FD of 15 random subsets of N/5 to N pictures, fitted by a line in 1/N, at 1/N = 0",
    "precision": "share of generated pictures within the ball to the 3rd neighbour of a real one, equal numbers",
    "recall": "share of real pictures within the ball to the 3rd neighbour of a generated one, equal numbers",
    "density": "mean number of real balls (5th neighbour) around a generated picture, over 5, equal numbers",
    "coverage": "share of real balls (5th neighbour) that hold a generated picture, equal numbers",
    "NN ratio": "median Euclidean distance of generated to train over that of hold-out to train",
    "caption match": "share of captions with a picture nearer (cosine) to own than to a random other, seed 0",
}


@dataclass(frozen=True)
class Setting:
    """What all scores of one set of pictures have in common; fields as in Protocol, inputs: of the pictures."""

    network: Extractor
    n_gen: int
    inputs: Inputs
    seed_rule: str
    quantisation: str
    image_size: int

    def label(self, metric: str) -> str:
        """What a number is printed as: FD-<extractor>, never FID, which means one other extractor."""
        if not metric.startswith(("KID", "FD")):
            return metric
        kind, dash, rest = metric.partition("-")
        label = frechet_label(self.network) if kind == "FD" else f"{kind}-{self.network.name}"
        return label + dash + rest

    def protocol(self, metric: str, real: Reference, n_gen: int | None = None) -> Protocol:
        """The record of `metric` measured against `real`, with `n_gen` pictures where not all are used."""
        return self.protocol_of(metric, real.name, real.sha256, len(real.features), n_gen)

    def protocol_of(
        self, metric: str, reference: str, reference_sha256: str, n_ref: int, n_gen: int | None = None
    ) -> Protocol:
        """The record of `metric` measured against what is so called."""
        return Protocol(
            metric=metric,
            definition=DEFINITIONS[metric],
            extractor=self.network.name,
            extractor_weights_sha256=self.network.weights_sha256,
            input=self.quantisation,
            resize=self.network.resize,
            layer=self.network.layer,
            dim=self.network.num_features,
            reference=reference,
            reference_sha256=reference_sha256,
            n_ref=n_ref,
            n_gen=n_gen or self.n_gen,
            conditioning=self.inputs.law,
            prompts_sha256=self.inputs.sha256,
            seed_rule=self.seed_rule,
            image_size=self.image_size,
        )

    def score(
        self,
        metric: str,
        real: Reference,
        values: Sequence[float],
        interval: tuple[float, float] | None = None,
        n_gen: int | None = None,
    ) -> Score:
        """Mean and sd of the values of each seed."""
        return Score.over_seeds(self.label(metric), values, self.protocol(metric, real, n_gen), interval)


def score_all(
    runs: Sequence[Tensor], train: Reference, holdout: Reference | None, setting: Setting
) -> list[Score]:
    """Scores of the features (N, D) of each seed's pictures, mean and sd over seeds.

    KID and FD to `train`, FD-infinity from 20 D pictures on; precision, recall, density, coverage with as many real
    pictures as generated ones; KID to `holdout` and NN ratio where there is one; caption match where the pictures
    were made from captions that can be told apart, with the interval for one seed's number of captions.
    """
    own = [within(x) for x in runs]
    out = [
        setting.score("KID", real, [real.kid(x, k) for x, k in zip(runs, own, strict=True)])
        for real in (train, holdout)
        if real is not None
    ]
    out.append(setting.score("FD", train, [train.frechet(x) for x in runs]))
    if setting.n_gen >= INFINITY_RATIO * setting.network.num_features:
        limits = [frechet_infinity(x, train.moments) for x in runs]
        out.append(setting.score("FD-infinity", train, limits))
    out += manifold_scores(runs, train, setting)
    if holdout is not None:
        unseen = train.distance_of(holdout)
        ratios = [neighbour_ratio(x, train.features, unseen) for x in runs]
        out.append(setting.score("NN ratio", join(train, holdout), ratios))
    if setting.inputs.conditioning == "caption" and train.captioned:
        captions = setting.inputs.captions
        shares = [match_share(x, captions, train.features, train.captions) for x in runs]
        typical = Share(round(sum(s.hits for s in shares) / len(shares)), shares[0].trials)
        out.append(
            setting.score(
                "caption match", train, [s.value for s in shares], typical.interval, n_gen=typical.trials
            )
        )
    return out


def image_text_score(runs: Sequence[Tensor], scorer: Scorer, measure: Measure, setting: Setting) -> Score:
    """Score of the cosines (N,) of each seed's pictures with their captions or the names of their classes."""
    protocol = image_text_protocol(
        scorer,
        measure,
        captions=setting.inputs.captions,
        input=setting.quantisation,
        conditioning=setting.inputs.law,
        seed_rule=setting.seed_rule,
        image_size=setting.image_size,
    )
    protocol = replace(protocol, prompts_sha256=setting.inputs.sha256)
    return Score.over_seeds(measure.label(scorer), [measure.of(x) for x in runs], protocol)


def condition_score(
    runs: Sequence[Tensor], conditions: Conditions, rows: Sequence[int], setting: Setting
) -> Score:
    """Score of the condition errors (N,) of each seed's pictures, which belong to `rows` of the conditions."""
    rows = sorted({i % len(conditions.places) for i in rows})
    protocol = Protocol(
        metric="condition error",
        definition=conditions.control.definition,
        extractor=conditions.name,
        extractor_weights_sha256="",
        input=setting.quantisation,
        resize="none",
        layer="",
        dim=0,
        reference=conditions.source,
        reference_sha256=conditions.identity(rows),
        n_ref=len(rows),
        n_gen=setting.n_gen,
        conditioning=setting.inputs.law,
        prompts_sha256=setting.inputs.sha256,
        seed_rule=setting.seed_rule,
        image_size=setting.image_size,
    )
    return Score.over_seeds("condition error", [float(x.mean()) for x in runs], protocol)


def manifold_scores(runs: Sequence[Tensor], train: Reference, setting: Setting) -> list[Score]:
    """Precision, recall, density and coverage with the first n pictures of both sides; none below 6."""
    n = min(setting.n_gen, len(train.features))
    if n <= max(PRECISION_NEIGHBOURS, COVERAGE_NEIGHBOURS):
        return []
    real = train.head(n)
    found = [manifold(real.features, x[:n], reach=real.reach) for x in runs]
    names = ("precision", "recall", "density", "coverage")
    return [
        setting.score(k, real, values, n_gen=n)
        for k, values in zip(names, zip(*found, strict=True), strict=True)
    ]


def join(a: Reference, b: Reference) -> Reference:
    """`a` under a name and hash that tell of `b` too."""
    return replace(a, name=f"{a.name} and {b.name}", sha256=f"{a.sha256}+{b.sha256}")
