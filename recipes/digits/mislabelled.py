"""A tenth of the pretraining labels is wrong: does influence find them?

    python recipes/digits/mislabelled.py [--config FILE.yaml] [--section.key value ...]

Takes the stages of frozen.yaml (or of the given configuration), gives a random tenth of the pretraining images
another label, trains both stages anew to stationary points and prints the area under the ROC curve of the wrong
labels, ranked by harm to the pretraining task itself (its held-out images), by harm to the finetuned model's test
images, and by the examples' own losses.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

from hf_msif import MultiStageInfluence, training
from hf_msif.engine.files import write_json
from hf_msif.project import config
from hf_msif.project.run import Run
from hf_msif.project.train import polish

SHARE = 0.1
DEFAULT_CONFIG = Path(__file__).with_name("frozen.yaml")


def main() -> None:
    arguments = sys.argv[1:]
    arguments = arguments if "--config" in arguments else ["--config", str(DEFAULT_CONFIG), *arguments]
    # Some images of the pretraining classes are set aside, to ask about the pretraining task itself.
    held_out = ["--stages.pretraining.data.test_fraction", "0.17"]
    run = Run(config.parse([*arguments, *held_out]))
    first, last = run.names[0], run.names[-1]
    rows, tests = run.rows(first), run.tests()
    wrong = mislabel(rows, run.config.seed)
    models = run.new_models(run.config.seed)
    for name, model, before in zip(run.names, models, [None, *models], strict=False):
        if before is not None:
            model.base_model.load_state_dict(before.base_model.state_dict())
        print(polish(run, name, model, before))
    chain = run.chain(dict(zip(run.names, models, strict=True)))
    accuracy = training.evaluate(models[-1], run.objectives[last], tests)["accuracy"]
    pretraining = MultiStageInfluence([chain.stages[0].stage])
    pretraining_scores = pretraining.query(run.rows(first, "test"), aggregate="sum").score(rows)
    influence = chain.query(tests, aggregate="sum").score(rows).influence()
    measures = {
        "influence on held-out pretraining images": pretraining_scores.influence(),
        "influence on the finetuned model's tests": influence,
        "its absolute value": np.abs(influence),
        "the example's own loss": pretraining_scores.frame["loss"].to_numpy(),
    }
    areas = {name: float(roc_auc_score(wrong, values)) for name, values in measures.items()}
    print(f"{wrong.sum()} of {len(wrong)} pretraining labels are wrong; test accuracy {accuracy:.3f}")
    print("area under the ROC curve of the wrong labels, ranked by")
    for name, value in areas.items():
        print(f"  {name:42} {value:.3f}")
    write_json(run.folder / "mislabelled.json", {"wrong": int(wrong.sum()), "rows": len(rows), "auc": areas})


def mislabel(rows: list[dict], seed: int) -> np.ndarray:
    """Gives a random share of the rows another of their labels, in place; returns which rows, as booleans."""
    generator = np.random.default_rng(seed)
    classes = sorted({row["label"] for row in rows})
    wrong = np.zeros(len(rows), dtype=bool)
    wrong[generator.choice(len(rows), round(SHARE * len(rows)), replace=False)] = True
    for row in (row for row, is_wrong in zip(rows, wrong, strict=True) if is_wrong):
        row["label"] = int(generator.choice([label for label in classes if label != row["label"]]))
    return wrong


if __name__ == "__main__":
    main()
