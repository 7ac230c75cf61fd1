"""2D encoders of natural images, through timm, and where their weights come from."""

import difflib
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants, try_to_load_from_cache
from torch import Tensor, nn

from nnunet_ssl.errors import UserError

WEIGHTS_VARIABLE = "NNUNET_SSL_WEIGHTS"
STRIDES = (4, 8, 16, 32)  # of the features that a decode head reads
ENDINGS = (".safetensors", ".pth", ".pt", ".bin")
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
HUB_TIMEOUT = 5  # seconds; the hub's own client tries for most of a minute


class Backbone(nn.Module):
    """A timm encoder that returns its features of stride 4, 8, 16 and 32.

    Args:
        name: timm's, with or without the tag of its weights: "pvt_v2_b2", "resnet50.a1_in1k".
        **kwargs: of `timm.create_model`.

    Attributes:
        channels: of the four features.

    Raises:
        UserError: timm has no such network, or it has no such features for images of any size.
    """

    def __init__(self, name: str, **kwargs: Any):
        super().__init__()
        check_backbone(name)
        try:
            self.encoder = timm.create_model(name, features_only=True, **kwargs)
            info: Any = self.encoder.feature_info
            strides = info.reduction()
            # the last of each stride: ResNets have two of some
            self.levels = [len(strides) - 1 - strides[::-1].index(s) for s in STRIDES]
            channels = info.channels()
            self.channels = [channels[level] for level in self.levels]
            self._check_features()
        except (RuntimeError, ValueError, AssertionError) as error:
            raise UserError(
                f"backbone={name} does not give features of stride 4, 8, 16 and 32 for images of "
                f"any size ({error}). Choose a PVT v2, ResNet or ConvNeXt, such as pvt_v2_b2, "
                f"resnet50 or convnext_tiny."
            ) from error

    @torch.no_grad()
    def _check_features(self) -> None:
        training = self.encoder.training
        shapes = [tuple(f.shape[1:]) for f in self.encoder.eval()(torch.zeros(1, 3, 64, 96))]
        self.encoder.train(training)
        for level, channels, stride in zip(self.levels, self.channels, STRIDES, strict=True):
            expected = (channels, 64 // stride, 96 // stride)
            if shapes[level] != expected:
                raise ValueError(f"{shapes[level]} in place of {expected}")

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the four features, (N, C_i, H / s_i, W / s_i).

        Args:
            x: (N, 3, H, W), H and W multiples of 32.
        """
        features = self.encoder(x)
        return [features[level] for level in self.levels]


def check_backbone(name: str) -> None:
    """Raise UserError, with similar names, if timm has no network of this name."""
    if not timm.is_model(name):
        similar = difflib.get_close_matches(name, timm.list_models(), 5, 0.5)
        raise UserError(
            f"timm {timm.__version__} has no network {name!r}. "
            f"Similar: {', '.join(similar) or 'none'}. Known to work: pvt_v2_b0 to pvt_v2_b5, "
            f"resnet18 to resnet152, convnext_tiny to convnext_large."
        )


def pretrained_backbone(name: str) -> Backbone:
    """Return an encoder with its pretrained weights.

    They come from the file that `NNUNET_SSL_WEIGHTS` names, or from `<name>.pth` (.safetensors,
    .pt, .bin) in the folder that it names; without the variable from timm's hub or what is cached
    of it. No random number is drawn.

    Raises:
        UserError: no such network, no weights to be had, or a file that does not fit; tells the
            command that gets them.
    """
    check_backbone(name)
    place = os.environ.get(WEIGHTS_VARIABLE)
    file = weights_file(name, Path(place)) if place else cached_weights(name)
    source, options = str(file or "timm's hub"), {}
    if file is not None:
        options = {"pretrained_cfg_overlay": {"state_dict": read_weights(file)}}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # of the host alone
            random = Backbone(name, pretrained=False)
            torch.default_generator.manual_seed(0)
            loaded = Backbone(name, pretrained=True, **options)
    except Exception as error:  # what timm, the hub's client and torch raise has no common class
        raise UserError(
            f"{source} gives no weights of {name}: {error}\n{how_to_get(name)}"
        ) from error
    # timm loads encoders leniently: what still has its random start was not in the file
    pairs = zip(random.named_parameters(), loaded.parameters(), strict=True)
    missing = [key for (key, a), b in pairs if a.ndim > 1 and torch.equal(a, b)]
    if missing:
        raise UserError(
            f"{source} has no weights for {len(missing)} layers of {name}, the first being "
            f"{missing[0]!r}: it is of another network.\n{how_to_get(name)}"
        )
    return loaded


def weights_file(name: str, place: Path) -> Path:
    """Return the local file of weights.

    Raises:
        UserError: neither a file nor a folder with one.
    """
    if place.is_file():
        return place
    files = [place / f"{name}{ending}" for ending in ENDINGS]
    found = [file for file in files if file.is_file()]
    if not found:
        what = f"has no {name}.pth" if place.is_dir() else "does not exist"
        raise UserError(f"{WEIGHTS_VARIABLE}={place} {what}.\n{how_to_get(name)}")
    return found[0]


def read_weights(file: Path) -> dict[str, Tensor]:
    """Read tensors by name, without running code that a file may hold.

    Raises:
        UserError: not a file of weights.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # cut short, not a checkpoint, or with foreign classes
        raise UserError(f"{file} cannot be read as weights: {error}") from error
    for key in ("state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UserError(f"{file} holds no weights: a dict of tensors by name is needed.")
    return {key.removeprefix("module."): tensor for key, tensor in state.items()}


def cached_weights(name: str) -> Path | None:
    """Return the hub's file in the local cache; None if it must be, and can be, downloaded.

    Raises:
        UserError: not cached, and the hub does not answer.
    """
    config = timm.get_pretrained_cfg(name)
    repository = getattr(config, "hf_hub_id", None)
    if not repository:
        return None  # an address of timm's own, or no weights at all: timm says so at once
    for filename in HUB_FILES:
        found = try_to_load_from_cache(repository, filename)
        if isinstance(found, str):
            return Path(found)
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT):
            return None
    except urllib.error.HTTPError:
        return None  # it answers
    except OSError as error:
        raise UserError(
            f"Weights of {name} are not on this machine, and timm's hub does not answer "
            f"({getattr(error, 'reason', error)}).\n{how_to_get(name)}"
        ) from error


def how_to_get(name: str) -> str:
    """Return what to do about missing weights."""
    code = (
        f"import timm, torch; torch.save("
        f"timm.create_model('{name}', pretrained=True).state_dict(), '{name}.pth')"
    )
    return (
        f"On a machine with network, run\n"
        f'  python -c "{code}"\n'
        f"copy {name}.pth to this machine and run\n"
        f"  export {WEIGHTS_VARIABLE}=/path/to/{name}.pth\n"
        f"before training. With weights=random in the trainer's name the 2D network starts from "
        f"random weights; that is not the published method."
    )
