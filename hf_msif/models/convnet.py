"""The image models of the paper's §4.1 (Table A): convolutions are the encoder, dense layers the head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput

ACTIVATIONS = {"tanh": nn.Tanh, "softplus": nn.Softplus, "gelu": nn.GELU, "silu": nn.SiLU, "relu": nn.ReLU}
POOLINGS = {"mean": nn.AvgPool2d, "max": nn.MaxPool2d}


class ConvNetConfig(PretrainedConfig):
    """Configuration of `ConvNetModel` and `ConvNetForImageClassification`.

    Args:
        image_size: height and width of the images in pixels; one number if they are equal.
        num_channels: channels of the images.
        channels: output channels of the convolutions, one entry per layer.
        kernel_size: width of every convolution, odd; borders are padded so that the size of the image is kept.
        pool_size: window and stride of the pooling after each convolution; 1 for no pooling.
        pooling: "mean" or "max".
        dense: units of the hidden dense layers of the head; an empty list is a linear head.
        activation: "tanh", "softplus", "gelu" or "silu", which have second derivatives everywhere, or "relu". An
            influence is the derivative of a minimum. The kinks of a ReLU (and of max pooling) move with the
            parameters, which the Hessian does not show.
        kwargs: of `PretrainedConfig`, e.g. `num_labels`.

    Raises:
        ValueError: an unknown activation or pooling, an even `kernel_size`, no convolution, or more pooling than the
            image has pixels.

    >>> ConvNetConfig(image_size=28, channels=[8, 16], pool_size=2).features
    784
    """

    model_type = "msif_convnet"

    def __init__(
        self,
        image_size: int | Sequence[int] = 28,
        num_channels: int = 1,
        channels: Sequence[int] = (32, 64),
        kernel_size: int = 3,
        pool_size: int = 2,
        pooling: str = "mean",
        dense: Sequence[int] = (128,),
        activation: str = "tanh",
        **kwargs,
    ):
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; expected one of {list(ACTIVATIONS)}.")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling is {pooling!r}; expected one of {list(POOLINGS)}.")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}; expected an odd number, which keeps the image's size.")
        if not channels:
            raise ValueError("channels is empty; expected at least one convolution: stages share the convolutions.")
        self.image_size = [image_size] * 2 if isinstance(image_size, int) else list(image_size)
        if min(side // pool_size ** len(channels) for side in self.image_size) < 1:
            raise ValueError(
                f"{len(channels)} poolings of {pool_size} leave no pixel of an image of {self.image_size}: use fewer "
                "entries in channels or a smaller pool_size."
            )
        self.num_channels, self.channels, self.dense = num_channels, list(channels), list(dense)
        self.kernel_size, self.pool_size, self.pooling = kernel_size, pool_size, pooling
        self.activation = activation
        super().__init__(**kwargs)

    @property
    def features(self) -> int:
        """Number of features that the encoder returns per image."""
        height, width = (side // self.pool_size ** len(self.channels) for side in self.image_size)
        return height * width * self.channels[-1]


class _ConvNetPreTrainedModel(PreTrainedModel):
    """What the two models share: configuration and initial weights."""

    config_class = ConvNetConfig
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # With the language models' standard deviation of 0.02 the signal would vanish in layers of this width.
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            initialization.xavier_uniform_(module.weight)
            initialization.zeros_(cast(Tensor, module.bias))


class ConvNetModel(_ConvNetPreTrainedModel):
    """(Convolution, activation, pooling) × layers, flattened. This is the encoder W.

    `pixel_values` of shape (B, num_channels, height, width) become `last_hidden_state` of shape (B, features).
    """

    def __init__(self, config: ConvNetConfig):
        super().__init__(config)
        layers, width = [], config.num_channels
        for channels in config.channels:
            convolution = nn.Conv2d(width, channels, config.kernel_size, padding=config.kernel_size // 2)
            layers += [convolution, ACTIVATIONS[config.activation]()]
            if config.pool_size > 1:
                layers.append(POOLINGS[config.pooling](config.pool_size))
            width = channels
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.post_init()

    def forward(self, pixel_values: Tensor, **_) -> BaseModelOutput:
        expected = (self.config.num_channels, *self.config.image_size)
        if tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(f"images have shape {tuple(pixel_values.shape[1:])}; the configuration says {expected}.")
        return BaseModelOutput(
            last_hidden_state=self.layers(pixel_values.to(cast(Tensor, self.layers[0].weight).dtype))
        )


class ConvNetForImageClassification(_ConvNetPreTrainedModel):
    """`ConvNetModel` (W) and a head of dense layers (U or Θ): (Linear, activation) × hidden layers, Linear.

    `pixel_values` of shape (B, num_channels, height, width) become `logits` of shape (B, num_labels).
    """

    def __init__(self, config: ConvNetConfig):
        super().__init__(config)
        self.encoder = ConvNetModel(config)
        layers, width = [], config.features
        for units in config.dense:
            layers += [nn.Linear(width, units), ACTIVATIONS[config.activation]()]
            width = units
        self.head = nn.Sequential(*layers, nn.Linear(width, cast(int, config.num_labels)))
        self.post_init()

    def forward(self, pixel_values: Tensor, **_) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.head(self.encoder(pixel_values).last_hidden_state))


AutoConfig.register(ConvNetConfig.model_type, ConvNetConfig)
AutoModel.register(ConvNetConfig, ConvNetModel)
AutoModelForImageClassification.register(ConvNetConfig, ConvNetForImageClassification)
