"""The scores of one set of pictures: from features to numbers with their protocol."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from .features import Extractor
from .kid import DEFINITION as KID_DEFINITION
from .kid import mean_sd
from .neighbours import Share, match_share, neighbour_ratio
from .protocol import Protocol, Score, hash_prompts
from .reference import Reference

DEFINITIONS = {
    "KID": KID_DEFINITION,
    "FD": "squared Frechet distance of Gaussians, ddof 1, float64; falls as n_gen grows",
    "NN ratio": "median Euclidean distance of generated to train over that of hold-out to train",
    "caption match": "share of captions with a picture nearer (cosine) to own than to a random other, seed 0",
}


@dataclass(frozen=True)
class Setting:
    """What all scores of one set of pictures have in common; the fields are those of Protocol.

    prompts  the captions that the pictures were made from, in order; empty if from none
    """

    network: Extractor
    n_gen: int
    prompts: Sequence[str]
    conditioning: str
    seed_rule: str
    quantisation: str
    image_size: int

    def label(self, metric: str) -> str:
        """What a number is printed as: FD-<extractor>, never FID, which means one other extractor."""
        return f"{metric}-{self.network.name}" if metric in ("KID", "FD") else metric

    def protocol(self, metric: str, real: Reference) -> Protocol:
        """The record of `metric` measured against `real`."""
        return Protocol(
            metric=metric,
            definition=DEFINITIONS[metric],
            extractor=self.network.name,
            extractor_weights_sha256=self.network.weights_sha256,
            input=self.quantisation,
            resize=self.network.resize,
            layer=self.network.layer,
            dim=self.network.num_features,
            reference=real.name,
            reference_sha256=real.sha256,
            n_ref=len(real.features),
            n_gen=self.n_gen,
            prompts_sha256=hash_prompts(self.prompts),
            conditioning=self.conditioning,
            seed_rule=self.seed_rule,
            image_size=self.image_size,
        )

    def score(
        self,
        metric: str,
        real: Reference,
        values: Sequence[float],
        interval: tuple[float, float] | None = None,
    ) -> Score:
        """Mean and sd of the values of each seed."""
        return Score(self.label(metric), *mean_sd(values), self.protocol(metric, real), interval)


def score_all(
    runs: Sequence[Tensor], train: Reference, holdout: Reference | None, setting: Setting
) -> list[Score]:
    """Scores of the features (N, D) of each seed's pictures, mean and sd over seeds.

    KID and FD to `train`; KID to `holdout` and NN ratio where there is one; caption match where the pictures
    were made from captions that can be told apart, with the interval for one seed's number of captions.
    """
    out = [setting.score("KID", train, [train.kid(x) for x in runs])]
    if holdout is not None:
        out.append(setting.score("KID", holdout, [holdout.kid(x) for x in runs]))
    out.append(setting.score("FD", train, [train.frechet(x) for x in runs]))
    if holdout is not None:
        ratios = [neighbour_ratio(x, train.features, holdout.features) for x in runs]
        out.append(setting.score("NN ratio", join(train, holdout), ratios))
    if setting.prompts and train.captioned:
        shares = [match_share(x, setting.prompts, train.features, train.captions) for x in runs]
        typical = Share(round(sum(s.hits for s in shares) / len(shares)), shares[0].trials)
        out.append(setting.score("caption match", train, [s.value for s in shares], typical.interval))
    return out


def join(a: Reference, b: Reference) -> Reference:
    """`a` under a name and hash that tell of `b` too."""
    return replace(a, name=f"{a.name} and {b.name}", sha256=f"{a.sha256}+{b.sha256}")
