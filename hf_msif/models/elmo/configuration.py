"""Configuration of the ELMo models."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PretrainedConfig

from ...errors import InputError

# (width, number) of the "original" model of Peters et al. (2018), which has 93.6 million parameters.
FILTERS = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))
# Special characters: begin and end of a sentence, begin and end of a word, and what fills up a short word.
BYTES, SPECIAL = 256, 5


class ElmoConfig(PretrainedConfig):
    """Configuration of `ElmoModel`, `ElmoForBidirectionalLM` and `ElmoForSequenceClassification`.

    The defaults are those of the published "original" model.

    Args:
        vocab_size: V, words that `ElmoForBidirectionalLM` predicts (rows of U). The input consists of characters and
            is not limited by it.
        max_characters: characters per token, the two that mark its ends included; longer tokens are cut.
        character_size: width of a character's embedding.
        filters: (width, number) of the character convolutions.
        num_highway_layers: highway layers after the convolutions.
        activation: "relu" or "tanh", after the convolutions.
        num_hidden_layers: LSTM layers per direction.
        cell_size: entries of an LSTM's cell.
        projection_size: entries of an LSTM's output; `hidden_size`, the width of the model's output, is twice this.
        cell_clip: entries of the cell are clipped to ±cell_clip; None: not clipped.
        projection_clip: entries of an LSTM's output are clipped to ±projection_clip; None: not clipped.
        use_skip_connections: each layer after the first adds its input to its output.
        dropout: rate in training, on the input of every LSTM layer and on the output of the last one.
        sampled_softmax: number of random words that in training stand for the whole vocabulary in the denominator of
            the softmax; 0: exact. Evaluation and derivatives are always exact.
        stateful: row i of a batch continues where row i of the batch before ended, as in AllenNLP. The output for a
            sentence then depends on what was read before, so that influence functions are not defined.
        classifier_hidden_size: units of the classifier's hidden layer.
        kwargs: of `PretrainedConfig`, e.g. `num_labels`.

    Raises:
        InputError: an unknown activation, filters that are missing or wider than a token, or `max_characters` below 3.

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
        """Width of the output: 2 · projection_size, one half per direction."""
        return 2 * self.projection_size

    @property
    def n_filters(self) -> int:
        """Number of character convolutions of all widths."""
        return sum(number for _, number in self.filters)

    @property
    def n_characters(self) -> int:
        """Rows of the character embedding: padding (a zero row), bytes and special characters."""
        return 1 + BYTES + SPECIAL
