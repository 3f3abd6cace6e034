"""A differentiation of your own: the plain gradient product, averaged over a stage's model and an earlier one."""

import tempfile

import torch

from hf_msif import MultiStageInfluence, Stage, adapters, influence, models, objectives


class MeanDirection:
    def __init__(self, directions):  # the same u = a, at each model
        self.directions, self.tensors = directions, directions[0].tensors
        self.columns, self.certificate = directions[0].columns, directions[0].certificate

    def influence(self, batch, rows):
        each = [direction.influence(batch, rows) for direction in self.directions]
        return each[0]._replace(influence=sum(scored.influence for scored in each) / len(each))


class Averaged(influence.Differentiation):  # Stage.run is the folder of the earlier model
    def pull_back(self, adjoint, checkpoint=None):
        u = {name: adjoint[name] for name in self.bound.split.trained}
        certificate = influence.DirectCertificate("averaged", len(next(iter(u.values()))))
        return self.load(u, certificate.to_dict()), {name: adjoint[name] for name in self.bound.split.inherited}

    def load(self, tensors, certificate):
        bound, certificate = self.bound, influence.DirectCertificate(**certificate)
        model = type(bound.stage.model).from_pretrained(bound.stage.run)
        at = (bound.model, adapters.FunctionalModel(model, bound.engine.device))
        return MeanDirection([influence.Direction(model, bound.objective, tensors, certificate) for model in at])


if __name__ == "__main__":
    config = models.ConvNetConfig(image_size=6, channels=[2], dense=[], num_labels=3)
    early, late = (models.ConvNetForImageClassification(config) for _ in range(2))
    rows = [{"example_id": i, "image": torch.randn(6, 6).tolist(), "label": i % 3} for i in range(20)]
    early.save_pretrained(folder := tempfile.mkdtemp())
    stage = Stage("only", late, objectives.ImageClassification(), rows, link=Averaged, run=folder)
    query = MultiStageInfluence([stage], progress=False).query(rows[:1])
    print(query.certificates["only"], query.score(rows).influence()[:3], sep="\n")
