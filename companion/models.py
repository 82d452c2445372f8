"""Networks that the notebooks train, and a factory that finds them, or a user's own, by name."""

import difflib
import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


class LeNet5(nn.Module):
    """LeNet5 for images `[N, 3, 32, 32]`, giving logits `[N, classes]`; two hidden layers of `nodes_1` and
    `nodes_2` units.

    Source: LeCun et al. 1998, with ReLU and max pooling.
    """

    def __init__(self, nodes_1: int = 120, nodes_2: int = 84, classes: int = 10, channels: int = 3):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2)
        self.relu = nn.ReLU()
        self.fc1 = nn.Linear(16 * 5 * 5, nodes_1)
        self.fc2 = nn.Linear(nodes_1, nodes_2)
        self.fc3 = nn.Linear(nodes_2, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.relu(self.conv1(x)))  # [N, 6, 14, 14]
        x = self.pool(self.relu(self.conv2(x)))  # [N, 16, 5, 5]
        x = self.relu(self.fc1(x.flatten(1)))  # [N, nodes_1]
        return self.fc3(self.relu(self.fc2(x)))  # [N, classes]


def resnet18(classes: int = 10) -> nn.Module:
    """torchvision's ResNet-18 with the stem for small images `[N, 3, 32, 32]`: a 3x3 convolution of stride 1,
    no pooling.

    Source: He et al. 2015, section 4.2 (CIFAR-10).
    """
    import torchvision

    model = torchvision.models.resnet18(num_classes=classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


class AlexNet(nn.Module):
    """AlexNet sized for images `[N, 3, 64, 64]`, in the three parts of torchvision's: `features`, `avgpool`,
    `classifier`.

    `width` scales the channels. Source: Krizhevsky 2014, "One weird trick".
    """

    def __init__(self, classes: int = 10, width: float = 1.0, hidden: int = 512):
        super().__init__()
        c1, c2, c3, c4 = (max(1, int(channels * width)) for channels in (64, 192, 384, 256))
        self.features = nn.Sequential(
            nn.Conv2d(3, c1, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(c1, c2, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(c2, c3, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(c3, c4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(c4, c4, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((4, 4))
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(c4 * 4 * 4, hidden),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


class LSTMClassifier(nn.Module):
    """An LSTM that reads sequences `[N, steps, features]` and gives logits `[N, classes]` of the last step.

    Source: Hochreiter and Schmidhuber 1997.
    """

    def __init__(self, features: int, hidden: int = 512, layers: int = 2, classes: int = 10):
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class EncoderClassifier(nn.Module):
    """A transformer encoder over sequences `[N, steps, features]`, giving logits `[N, classes]` of the mean.

    Each step has a learned position. Source: Vaswani et al. 2017, with the normalisation first.
    """

    def __init__(
        self,
        features: int,
        steps: int,
        width: int = 768,
        layers: int = 6,
        heads: int = 8,
        classes: int = 10,
    ):
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.position = nn.Parameter(0.02 * torch.randn(steps, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embed(x) + self.position).mean(1))


class TransformerBlock(nn.Module):
    """Self-attention and a network of two layers, each added to what comes in `[N, steps, width]`.

    Queries, keys and values of a head lie side by side in `qkv`, so that its outputs can be shared out by
    heads (tensor parallel). Source: Vaswani et al. 2017, with the normalisation first; Shoeybi et al. 2019.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.head_width = width // heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(self.norm_1(x)).unflatten(-1, (-1, 3, self.head_width))  # [N, steps, heads, 3, each]
        q, k, v = heads.permute(3, 0, 2, 1, 4).unbind(0)  # [N, heads, steps, each]
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class VisionTransformer(nn.Module):
    """A transformer over the patches of images `[N, 3, pixels, pixels]`, giving logits `[N, classes]` of
    their mean.

    Source: Dosovitskiy et al. 2021, without its class token.
    """

    def __init__(
        self,
        classes: int = 10,
        width: int = 256,
        layers: int = 4,
        heads: int = 8,
        patch: int = 8,
        pixels: int = 32,
    ):
        super().__init__()
        if pixels % patch or width % heads:
            raise ValueError(f"patch={patch} must divide pixels={pixels}, and heads={heads} width={width}")
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn((pixels // patch) ** 2, width))
        self.blocks = nn.Sequential(*[TransformerBlock(width, heads) for _ in range(layers)])
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps = self.embed(x).flatten(2).transpose(1, 2).contiguous()  # [N, patches, width], can be sent
        return self.head(self.blocks(steps + self.position).mean(1))

    def split(self) -> dict[str, str]:
        """Which layers tensor parallelism splits, by name: "column" by outputs, "row" by inputs."""
        styles = {"qkv": "column", "out": "row", "up": "column", "down": "row"}
        return {
            f"blocks.{i}.{name}": style for i in range(len(self.blocks)) for name, style in styles.items()
        }


MODELS: dict[str, Callable[..., nn.Module]] = {"lenet5": LeNet5, "resnet18": resnet18, "alexnet": AlexNet}


def create(name: str, **options) -> nn.Module:
    """A new model by name: one of `MODELS`, or "package.module:function" for one of your own; `options` go to
    its maker.

    Raises ValueError when there is no such model or function, TypeError when it makes no `nn.Module`.
    """
    if ":" not in name:
        if name not in MODELS:
            near = difflib.get_close_matches(name.lower(), MODELS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"unknown model {name!r}: use one of {', '.join(MODELS)} or 'package.module:function'{hint}"
            )
        return MODELS[name](**options)
    module_name, _, function_name = name.partition(":")
    try:
        maker = getattr(importlib.import_module(module_name), function_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"cannot make model {name!r}: {error}") from error
    except AttributeError as error:
        raise ValueError(f"cannot make model {name!r}: {module_name} has no {function_name!r}") from error
    model = maker(**options)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} gave a {type(model).__name__}, not a torch.nn.Module")
    return model
