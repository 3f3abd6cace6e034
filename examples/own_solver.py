"""A solver of your own: (A + λI)u = b by a Neumann series, u ← u + η(b − (A + λI)u), until the residual is small."""

from dataclasses import dataclass

import torch

from hf_msif import MultiStageInfluence, Stage, models, objectives, solvers, vectors


@dataclass(frozen=True)
class Neumann(solvers.Solver):
    step: float  # η: the series converges where η < 2 / (largest eigenvalue + λ)
    damping: float
    tol: float = 1e-3
    max_iter: int = 1000

    def compute(self, operator, b, state, progress=None, checkpoint=None):
        u, norms = vectors.zeros_like(b), operator.norm(b)
        for iteration in range(self.max_iter + 1):
            residual = vectors.add(vectors.add(b, operator.matvec(u), -1.0), u, -self.damping)
            relative = operator.norm(residual) / norms
            if iteration == self.max_iter or (relative <= self.tol).all():
                break
            vectors.add_(u, residual, self.step)
        measured = (relative, operator.counts, iteration)
        return solvers.Solution(u, solvers.Certificate.from_residual("neumann", self.damping, self.tol, *measured))


torch.manual_seed(0)
config = models.ConvNetConfig(image_size=6, channels=[2], dense=[], num_labels=3)
before, after = (models.ConvNetForImageClassification(config) for _ in range(2))
after.base_model.load_state_dict(before.base_model.state_dict())
rows = [{"example_id": i, "image": torch.randn(6, 6).tolist(), "label": i % 3} for i in range(20)]
objective = objectives.ImageClassification(scale=1.0)
for solver in (Neumann(step=0.5, damping=0.5), solvers.CG(damping=0.5)):
    pretraining = Stage("pretraining", before, objective, rows, solver=solver)
    finetuning = Stage("finetuning", after, objective, rows[:9], trainable="head", solver=solver)
    query = MultiStageInfluence([pretraining, finetuning], progress=False).query(rows[9:11])
    print(query.certificates["pretraining"], query.score(rows).influence(1)[:3], sep="\n")
