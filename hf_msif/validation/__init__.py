"""Validation by retraining: does removing examples change the test loss as predicted? Leave-one-out, groups, LDS.

    retrain = validation.WarmStart(stages, tests)        # or FromScratch, or a function (omit, seed) → losses
    bank = validation.Bank(retrain, "runs/bank")         # cached, resumable, the same for all methods
    scores = msif.query(tests).score(corpus)
    result = validation.leave_one_out(bank, scores, baselines=validation.baselines(msif, tests, corpus))
    print(result)                                        # r, slope and intervals of every method, and the ceiling

By default a prediction is compared with what the run itself does without the examples (`OwnTruth`); with
`truth=ExpectedTruth(8)` and a bank of `FromScratch`, with the mean over eight other starts.

Every number is a *removal effect*: the change of a test loss when training examples are removed and all stages are
trained again. Positive means that the examples helped.
"""

from .bank import Bank, Retrained
from .baselines import BASELINES, baselines
from .experiments import Validation, datamodelling_score, leave_one_out, remove_groups
from .measures import Correlation, LossDifference, Recall, correlation, loss_difference
from .rankings import PlantedRecall, TopRemoval, planted_recall, remove_top
from .retraining import FromScratch, WarmStart
from .smoothness import Metasmoothness, metasmoothness
from .truth import OTHER_STARTS, ExpectedTruth, Measurement, OwnTruth

__all__ = [
    "BASELINES",
    "OTHER_STARTS",
    "Bank",
    "Correlation",
    "ExpectedTruth",
    "FromScratch",
    "LossDifference",
    "Measurement",
    "Metasmoothness",
    "OwnTruth",
    "PlantedRecall",
    "Recall",
    "Retrained",
    "TopRemoval",
    "Validation",
    "WarmStart",
    "baselines",
    "correlation",
    "datamodelling_score",
    "leave_one_out",
    "loss_difference",
    "metasmoothness",
    "planted_recall",
    "remove_groups",
    "remove_top",
]
