import copy

import pytest
import timm
import torch
from timm.layers import Conv2dSame
from torch import nn

from nnunet_ssl.errors import UserError
from nnunet_ssl.modules import (
    ImageSegmenter,
    LowRank,
    SliceNetwork,
    add_low_rank,
    backbones,
    pretrained_backbone,
)

SMALL = "pvt_v2_b0"


def without_dropout(network):
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network


# ------------------------------------------------------------------ low rank


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Linear(6, 4), (3, 6)),
        (nn.Conv2d(6, 4, 3, stride=2, padding=1), (2, 6, 7, 9)),
        (nn.Conv2d(6, 4, 2, stride=2, bias=False), (2, 6, 8, 8)),
        (Conv2dSame(6, 4, 3, stride=2), (2, 6, 8, 9)),
    ],
)
def test_low_rank_starts_at_the_layer_and_merges_into_it(layer, shape):
    x = torch.randn(shape)
    before = layer(x)
    adapted = LowRank(layer, rank=2, alpha=3, dropout=0.5)
    assert torch.equal(adapted(x), before)
    nn.init.normal_(adapted.up.weight)
    adapted.eval()
    merged = copy.deepcopy(layer)
    merged.weight = nn.Parameter(adapted.merged_weight())
    assert not torch.allclose(adapted(x), before)
    assert torch.allclose(adapted(x), merged(x), atol=1e-5)
    adapted(x).sum().backward()
    assert layer.weight.grad is None and adapted.down.weight.grad.abs().sum() > 0
    assert layer.bias is None or layer.bias.grad is not None


@pytest.mark.parametrize("name, kind", [(SMALL, nn.Linear), ("resnet10t", nn.Conv2d)])
def test_only_additions_biases_and_norms_learn(name, kind):
    encoder = timm.create_model(name, features_only=True)
    count = sum(isinstance(m, kind) for m in encoder.modules())
    x = torch.randn(1, 3, 64, 64)
    before = encoder.eval()(x)
    add_low_rank(encoder, 4, 4, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(before, encoder.eval()(x), strict=True))
    additions = [m for m in encoder.modules() if isinstance(m, LowRank)]
    assert len(additions) == count and all(isinstance(m.layer, kind) for m in additions)
    for key, parameter in encoder.named_parameters():
        added = ".down." in key or ".up." in key
        small = key.endswith("bias") or parameter.ndim == 1  # norms
        assert parameter.requires_grad == (added or small), key


def test_a_network_without_layers_is_refused():
    with pytest.raises(ValueError, match="ReLU"):
        add_low_rank(nn.ReLU(), 4, 4, 0.0)


# ------------------------------------------------------------------ the network


@pytest.mark.parametrize("name", [SMALL, "resnet10t", "convnext_atto"])
@pytest.mark.parametrize("channels, size", [(1, (8, 8)), (2, (33, 40)), (3, (64, 32))])
def test_any_size_and_any_channels(name, channels, size):
    network = ImageSegmenter(name, channels, 4)
    x = torch.randn(2, channels, *size)
    assert network(x).shape == (2, 4, *size)
    assert (network.mix is None) == (channels != 2)


def test_padding_is_cut_off_at_the_far_ends():
    network = ImageSegmenter(SMALL, 1, 2).eval()
    x = torch.randn(1, 1, 40, 50)
    padded = nn.functional.pad(x, (0, 14, 0, 24), mode="replicate")
    with torch.no_grad():
        assert torch.equal(network(x), network(padded)[..., :40, :50])


@pytest.mark.parametrize("axis", [0, 2])
def test_volumes_are_segmented_slice_by_slice(axis):
    network = SliceNetwork(ImageSegmenter(SMALL, 1, 2), axis, 10**9, None).eval()
    x = torch.randn(2, 1, 3, 32, 4) if axis == 2 else torch.randn(2, 1, 3, 32, 32)
    with torch.no_grad():
        found = network(x)
        assert found.shape == (2, 2, *x.shape[2:])
        for d in range(x.shape[2 + axis]):
            expected = network.segmenter(x.select(2 + axis, d))
            assert torch.allclose(found.select(2 + axis, d), expected, atol=1e-5)


def test_groups_of_slices_change_nothing_but_memory():
    torch.manual_seed(0)
    whole = without_dropout(SliceNetwork(ImageSegmenter(SMALL, 1, 2), 0, 10**9, None))
    groups = copy.deepcopy(whole)
    groups.pixels_at_once = 3 * 32 * 32
    seen = []
    groups.segmenter.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    x = torch.randn(2, 1, 4, 32, 32)
    outputs = [n(x) for n in (whole, groups)]
    assert torch.allclose(*outputs, atol=1e-5) and seen == [3, 3, 2]
    for output in outputs:
        (output**2).mean().backward()
    assert sorted(seen[3:]) == [2, 3, 3]  # anew in the backward pass
    for a, b in zip(whole.parameters(), groups.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5)


def test_dropout_is_the_same_when_groups_run_anew():
    network = SliceNetwork(ImageSegmenter(SMALL, 1, 2), 0, 32 * 32, None)
    network.add_low_rank(4, 4, 0.5)
    outputs = []
    layer = next(m for m in network.modules() if isinstance(m, LowRank))
    layer.dropout.register_forward_hook(lambda m, args, out: outputs.append(out.detach()))
    network(torch.randn(1, 1, 2, 32, 32)).sum().backward()
    first, again = outputs[:2], outputs[2:]
    assert len(again) == 2 and not torch.equal(*first)
    assert all(any(torch.equal(a, b) for b in again) for a in first)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_encoders_without_such_features_are_refused(name):
    with pytest.raises(UserError, match="pvt_v2_b2, resnet50 or convnext_tiny"):
        ImageSegmenter(name, 1, 2)


# ------------------------------------------------------------------ weights


@pytest.fixture
def no_hub(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.delenv(backbones.WEIGHTS_VARIABLE, raising=False)
    monkeypatch.setattr(backbones, "try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr(backbones.urllib.request, "urlopen", refuse)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Files as the command that is told writes them."""
    folder = tmp_path_factory.mktemp("weights")
    for name in (SMALL, "resnet10t"):
        torch.save(timm.create_model(name).state_dict(), folder / f"{name}.pth")
    return folder


def test_without_weights_the_command_that_gets_them_is_told(no_hub):
    with pytest.raises(UserError) as error:
        pretrained_backbone(SMALL)
    text = str(error.value)
    assert "no route" in text and "export NNUNET_SSL_WEIGHTS=" in text
    code = text.split('python -c "')[1].split('"')[0]
    assert f"timm.create_model('{SMALL}', pretrained=True)" in code
    compile(code, "command", "exec")


def test_a_file_or_its_folder_gives_the_weights(no_hub, weights, monkeypatch):
    state = torch.load(weights / f"{SMALL}.pth")
    for place in (weights, weights / f"{SMALL}.pth"):
        monkeypatch.setenv(backbones.WEIGHTS_VARIABLE, str(place))
        before = torch.random.get_rng_state()
        found = pretrained_backbone(SMALL)
        assert torch.equal(before, torch.random.get_rng_state())
        own = found.encoder.state_dict()
        expected = {k: v for k, v in state.items() if not k.startswith("head.")}
        assert len(own) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(own.values(), expected.values(), strict=True))


def test_what_the_hub_left_in_its_cache_needs_no_network(no_hub, weights, monkeypatch):
    file = str(weights / "resnet10t.pth")
    monkeypatch.setattr(backbones, "try_to_load_from_cache", lambda repository, name: file)
    found = pretrained_backbone("resnet10t").encoder.state_dict()
    assert torch.equal(found["conv1.0.weight"], torch.load(file)["conv1.0.weight"])


@pytest.mark.parametrize("low_rank", [False, True])
def test_weights_go_into_the_network(low_rank, weights, monkeypatch):
    monkeypatch.setenv(backbones.WEIGHTS_VARIABLE, str(weights))
    network = SliceNetwork(ImageSegmenter(SMALL, 1, 2), 0, 10**9, None).eval()
    if low_rank:
        network.add_low_rank(4, 4, 0.1)
    source = pretrained_backbone(SMALL).eval()
    network.load_backbone(source)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        pairs = zip(network.segmenter.backbone(x), source(x), strict=True)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def test_files_that_do_not_fit_are_named(no_hub, weights, monkeypatch, tmp_path):
    other = tmp_path / "other.pth"
    torch.save(timm.create_model("resnet10t").state_dict(), other)
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"no weights")
    listed = tmp_path / "list.pth"
    torch.save([1, 2], listed)
    for place, words in [
        (other, "other.pth"),
        (broken, "broken.pth cannot be read"),
        (listed, "list.pth holds no weights"),
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path, f"has no {SMALL}.pth"),
    ]:
        monkeypatch.setenv(backbones.WEIGHTS_VARIABLE, str(place))
        with pytest.raises(UserError, match=words):
            pretrained_backbone(SMALL)


def test_unknown_networks_are_told_with_similar_ones():
    with pytest.raises(UserError, match="pvt_v2_b2"):
        pretrained_backbone("pvt_v2_b22")
