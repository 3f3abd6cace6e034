"""scikit-learn's digits as two stages, 0–3 for pretraining and 4–9 for finetuning, both at stationary points."""

from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits

from hf_msif import Stage, solvers, training
from hf_msif.models import ConvNetConfig, ConvNetForImageClassification
from hf_msif.objectives import ImageClassification

OBJECTIVE = ImageClassification(scale=1 / 16, dtype="float64")
DECAY = (0.03, 0.01)


def rows(classes, size, skip=0, seed=0):
    """`size` digits of the classes, in a seeded order, labels counted from 0; `skip` of them are passed over."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(np.isin(labels, classes)))
    return [
        {"example_id": int(i), "image": images[i].reshape(8, 8), "label": int(labels[i]) - classes[0]}
        for i in order[skip : skip + size]
    ]


def network(labels, seed):
    torch.manual_seed(seed)
    config = ConvNetConfig(image_size=8, channels=[4, 8], dense=[], num_labels=labels)
    return ConvNetForImageClassification(config).double().eval()


def chain(pretraining, finetuning, alpha=None):
    """Two polished stages: a frozen encoder, or a proximal one where α is given."""
    before, after = network(4, 0), network(6, 1)
    training.polish(before, OBJECTIVE, pretraining, weight_decay=DECAY[0], batch_size=512, name="pretraining")
    after.encoder.load_state_dict(before.encoder.state_dict())
    settings = {"trainable": "head" if alpha is None else "all", "weight_decay": DECAY[1], "alpha": alpha}
    training.polish(after, OBJECTIVE, finetuning, previous=before, batch_size=512, name="finetuning", **settings)
    exact = {"curvature": "hessian", "solver": solvers.Dense(), "batch_size": 512}
    return [
        Stage("pretraining", before, OBJECTIVE, pretraining, weight_decay=DECAY[0], **exact),
        Stage("finetuning", after, OBJECTIVE, finetuning, **settings, **exact),
    ]


@cache
def frozen():
    """Stages and test rows with the encoder frozen; shared by tests, which must not change them."""
    return chain(rows(range(4), 300), rows(range(4, 10), 300)), rows(range(4, 10), 100, skip=300)
