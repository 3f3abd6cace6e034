"""Convolutions as the encoder, dense layers as the head: the image models of the paper's §4.1 (Table A)."""

from __future__ import annotations

from collections.abc import Sequence

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
        image_size: height and width of the images, one number if they are equal.
        num_channels: of the images.
        channels: output channels of the convolutions, one entry a layer.
        kernel_size: of every convolution, odd; borders are padded so that it keeps the size.
        pool_size: window and stride of the pooling after each convolution; 1 for none.
        pooling: "mean" or "max".
        dense: units of the hidden dense layers of the head; an empty list is a linear head.
        activation: "tanh", "softplus", "gelu" or "silu", which have second derivatives everywhere, or "relu". An
            influence is the derivative of a minimum: kinks of a ReLU (and of max pooling) move with the parameters and
            are not in its Hessian.
        num_labels and others: as in every `PretrainedConfig`.
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
            raise ValueError("channels is empty; expected at least one convolution, which is what stages share.")
        self.image_size = [image_size] * 2 if isinstance(image_size, int) else list(image_size)
        if min(side // pool_size ** len(channels) for side in self.image_size) < 1:
            raise ValueError(
                f"{len(channels)} poolings of {pool_size} leave nothing of an image of {self.image_size}: use fewer "
                "channels entries or a smaller pool_size."
            )
        self.num_channels, self.channels, self.dense = num_channels, list(channels), list(dense)
        self.kernel_size, self.pool_size, self.pooling = kernel_size, pool_size, pooling
        self.activation = activation
        super().__init__(**kwargs)

    @property
    def features(self) -> int:
        """Length of the encoder's output."""
        height, width = (side // self.pool_size ** len(self.channels) for side in self.image_size)
        return height * width * self.channels[-1]


class _Pretrained(PreTrainedModel):
    config_class = ConvNetConfig
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The language models' 0.02 would leave layers of this width without a signal.
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            initialization.xavier_uniform_(module.weight)
            initialization.zeros_(module.bias)


class ConvNetModel(_Pretrained):
    """(Convolution, activation, pooling) × layers, flattened: pixels → features.

    `last_hidden_state` has shape (B, features).
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
        return BaseModelOutput(last_hidden_state=self.layers(pixel_values.to(self.layers[0].weight.dtype)))


class ConvNetForImageClassification(_Pretrained):
    """`ConvNetModel` (W) and a head of dense layers (U or Θ): (Linear, activation) × hidden layers, Linear."""

    def __init__(self, config: ConvNetConfig):
        super().__init__(config)
        self.encoder = ConvNetModel(config)
        layers, width = [], config.features
        for units in config.dense:
            layers += [nn.Linear(width, units), ACTIVATIONS[config.activation]()]
            width = units
        self.head = nn.Sequential(*layers, nn.Linear(width, config.num_labels))
        self.post_init()

    def forward(self, pixel_values: Tensor, **_) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.head(self.encoder(pixel_values).last_hidden_state))


AutoConfig.register(ConvNetConfig.model_type, ConvNetConfig)
AutoModel.register(ConvNetConfig, ConvNetModel)
AutoModelForImageClassification.register(ConvNetConfig, ConvNetForImageClassification)
