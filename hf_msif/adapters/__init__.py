"""Makes a `PreTrainedModel` fit for the method: its tensors by role (W, U, Θ), and the model as a function of them."""

from .functional import FunctionalModel
from .split import Split, decayed_names, encoder, split, write

__all__ = ["FunctionalModel", "Split", "decayed_names", "encoder", "split", "write"]
