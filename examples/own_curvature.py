"""A curvature of your own: the empirical Fisher, (1/N) Σ_i g_i g_iᵀ with the gradient g_i of example i's loss."""

import torch
from transformers import PretrainedConfig, PreTrainedModel

from hf_msif import MultiStageInfluence, Stage, objectives, solvers
from hf_msif.curvature import Curvature
from hf_msif.curvature.derivatives import example_gradients


class EmpiricalFisher(Curvature):
    def _product(self, evaluation, v):
        """Σ_i g_i (g_iᵀ v) over the examples of a batch, for each of the Q columns of v."""
        gradients = {name: g.flatten(1) for name, g in example_gradients(evaluation, list(v)).items()}
        slopes = sum(v[name].flatten(1) @ g.T for name, g in gradients.items())  # (Q, B)
        return {name: (slopes @ g).view_as(v[name]) for name, g in gradients.items()}


class Line(PreTrainedModel):
    def __init__(self):
        super().__init__(PretrainedConfig())
        self.slope = torch.nn.Parameter(torch.tensor([2.0]))

    def forward(self, x):
        return self.slope * x


class Squares(objectives.Objective):
    def collate(self, rows):
        return {key: torch.tensor([row[key] for row in rows]) for key in ("x", "y")}

    def losses(self, call, batch):
        losses = (call(x=batch["x"]) - batch["y"]) ** 2 / 2
        return losses, torch.ones_like(losses)


if __name__ == "__main__":
    rows = [{"x": 1.0, "y": 1.0}, {"x": 1.0, "y": 3.0}]  # slope 2 is the minimum; the gradients are 1 and −1
    stage = Stage("line", Line(), Squares(), rows, curvature=EmpiricalFisher, solver=solvers.CG(damping=0.0))
    print(MultiStageInfluence([stage], progress=False).query([{"x": 1.0, "y": 0.0}]).score(rows).influence())
