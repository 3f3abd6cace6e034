"""A chain of three toy stages, each solved exactly, with weights on every example."""

import fnmatch

from helpers.toy import ToyObjective, decayed, example_losses, minimise, toy, toy_rows
from hf_msif import Stage, solvers

# Three stages: everything trained; lower block and shift frozen, upper and gain proximal, new head; the same
# without the gain.
DECAY = [0.05, 0.02, 0.03]
ALPHA = [None, 0.3, 0.2]
TRAINABLE = ["all", ["encoder.upper.*", "encoder.gain", "head.*"], ["encoder.upper.*", "head.*"]]
SIZES = [24, 18, 16]


class Chain:
    """Three toy stages whose parameters solve their objectives exactly, with weights on every example."""

    def __init__(self):
        self.rows = [toy_rows(seed, size) for seed, size in zip((1, 2, 3), SIZES, strict=True)]
        self.tests = toy_rows(9, 2)
        self.models = [toy(seed) for seed in (0, 1, 2)]
        self.starts = [{n: p.detach().clone() for n, p in m.named_parameters()} for m in self.models]
        self.names = [
            list(start) if t == "all" else [n for n in start if any(fnmatch.fnmatchcase(n, p) for p in t)]
            for start, t in zip(self.starts, TRAINABLE, strict=True)
        ]
        self.optima = self.solve()
        self.starts = self.optima  # re-solving starts at the optimum and so stays in its basin

    def solve(self, weights=None):
        """Parameters of all stages; `weights` = (stage, example index, ε) adds ε ℓ to that stage's objective."""
        optima = []
        for k, start in enumerate(self.starts):
            begin = dict(start)
            if k:
                inherited = {n: optima[-1][n] for n in begin if n.startswith("encoder.")}
                frozen = {n: p for n, p in inherited.items() if n not in self.names[k]}
                begin |= frozen if weights is not None or optima else {}
                tied = {n: p for n, p in inherited.items() if n in self.names[k]}
            else:
                tied = {}

            def objective(parameters, k=k, tied=tied):
                sums, counts = example_losses(self.models[k], parameters, self.rows[k])
                total = sums.sum() / counts.sum()
                total = total + DECAY[k] / 2 * sum((parameters[n] ** 2).sum() for n in self.names[k] if decayed(n))
                for n, p in tied.items():
                    total = total + ALPHA[k] * ((parameters[n] - p) ** 2).sum()
                if weights is not None and weights[0] == k:
                    total = total + weights[2] * sums[weights[1]]
                return total

            optima.append(minimise(objective, begin, self.names[k]))
        return optima

    def test_losses(self, optima):
        return example_losses(self.models[-1], optima[-1], self.tests)[0].detach()

    def stages(self, **settings):
        for model, optimum in zip(self.models, self.optima, strict=True):
            model.load_state_dict(optimum, strict=False)
        settings = {"curvature": "hessian", "solver": solvers.Dense(), **settings}
        return [
            Stage(
                f"stage{k}", self.models[k], ToyObjective(), self.rows[k], TRAINABLE[k], DECAY[k], ALPHA[k], **settings
            )
            for k in range(3)
        ]
