"""Configuration of the ELMo models."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PretrainedConfig

from ...errors import InputError

# Of Peters et al. (2018), "original": with the cell and projection sizes below, 93.6 million parameters.
FILTERS = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))
BYTES, SPECIAL = 256, 5  # special: begin and end of a sentence, begin and end of a word, rest of a short word


class ElmoConfig(PretrainedConfig):
    """Configuration of `ElmoModel`, `ElmoForBidirectionalLM` and `ElmoForSequenceClassification`.

    The defaults are those of the published "original" model.

    Args:
        vocab_size: words that `ElmoForBidirectionalLM` predicts (rows of U). The input is characters and has no such
            limit.
        max_characters: a token, its two boundary characters included; longer tokens are cut.
        character_size: width of a character's embedding.
        filters: (width, number) of the character convolutions.
        num_highway_layers, activation: of what follows the convolutions; "relu" or "tanh".
        num_hidden_layers: LSTM layers of each direction.
        cell_size, projection_size: of an LSTM; `hidden_size`, the width of the output, is twice the latter.
        cell_clip, projection_clip: limits of the entries of cell and output; None for none.
        use_skip_connections: a layer after the first adds its input to its output.
        dropout: in training, on the input of every LSTM layer and on the output of the last.
        sampled_softmax: in training, so many random words stand for the whole vocabulary in the softmax's
            denominator; 0 for the exact one. Evaluation and derivatives are always exact.
        stateful: row i of a batch goes on where row i of the batch before ended, as AllenNLP does it. A sentence's
            output then depends on what was read before: not for influence functions.
        classifier_hidden_size: units of the classifier's hidden layer.
        num_labels and others: as in every `PretrainedConfig`.

    >>> config = ElmoConfig(projection_size=16)
    >>> config.hidden_size, config.n_filters
    (32, 2048)
    """

    model_type = "msif_elmo"

    def __init__(
        self,
        vocab_size: int = 793_471,
        max_characters: int = 50,
        character_size: int = 16,
        filters: Sequence[Sequence[int]] = FILTERS,
        num_highway_layers: int = 2,
        activation: str = "relu",
        num_hidden_layers: int = 2,
        cell_size: int = 4096,
        projection_size: int = 512,
        cell_clip: float | None = 3.0,
        projection_clip: float | None = 3.0,
        use_skip_connections: bool = True,
        dropout: float = 0.0,
        sampled_softmax: int = 0,
        stateful: bool = False,
        classifier_hidden_size: int = 64,
        **kwargs,
    ):
        if activation not in ("relu", "tanh"):
            raise InputError(f"activation is {activation!r}; expected 'relu' or 'tanh'.")
        if not filters or max(width for width, _ in filters) > max_characters:
            raise InputError(
                f"filters are {list(filters)}; expected at least one pair (width, number), with widths up to "
                f"max_characters={max_characters}."
            )
        if max_characters < 3:
            raise InputError(f"max_characters is {max_characters}; expected at least 3: two of them mark the word.")
        self.vocab_size, self.max_characters, self.character_size = vocab_size, max_characters, character_size
        self.filters = [list(pair) for pair in filters]
        self.num_highway_layers, self.activation = num_highway_layers, activation
        self.num_hidden_layers, self.cell_size, self.projection_size = num_hidden_layers, cell_size, projection_size
        self.cell_clip, self.projection_clip = cell_clip, projection_clip
        self.use_skip_connections = use_skip_connections
        self.dropout, self.sampled_softmax, self.stateful = dropout, sampled_softmax, stateful
        self.classifier_hidden_size = classifier_hidden_size
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width of the output: both directions."""
        return 2 * self.projection_size

    @property
    def n_filters(self) -> int:
        """Character convolutions in all."""
        return sum(number for _, number in self.filters)

    @property
    def n_characters(self) -> int:
        """Rows of the character embedding: padding (a zero row), bytes and special characters."""
        return 1 + BYTES + SPECIAL
