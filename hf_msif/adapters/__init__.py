"""A `PreTrainedModel` made fit for the method: the roles W, U and Θ of its tensors, and itself as their function."""

from .functional import FunctionalModel
from .split import Split, decayed_names, encoder, split, write

__all__ = ["FunctionalModel", "Split", "decayed_names", "encoder", "split", "write"]
