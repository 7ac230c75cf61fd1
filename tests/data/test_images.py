"""Images without their masks, and batches for contrast."""

import pickle

import blosc2
import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_pickle, write_pickle

from nnunet_ssl.data.images import ContrastLoader, ImageDataset, NoPatches, regular_patches
from nnunet_ssl.data.loader import TwoStreamLoader
from nnunet_ssl.data.views import Pipeline

from .cases import PLAIN, SHAPE, labeled_cases, still, transforms, unlabeled_cases

Z, Y, X, CASE, ONE = range(5)


@pytest.fixture(autouse=True)
def seeded():
    np.random.seed(0)
    torch.manual_seed(0)


def images(folder, number=5, **options) -> ImageDataset:
    cases = unlabeled_cases(folder, number, **options)
    return ImageDataset(dict.fromkeys(cases.identifiers, folder))


def contrast_loader(cases, patch, made, samples, parts=3, views=2, initial=None, **options):
    return ContrastLoader(
        cases,
        samples * views,
        initial or patch,
        patch,
        PLAIN,
        Pipeline(made, False, ("stock",) if views > 1 else ()),
        parts=parts,
        num_views=views,
        meta=("case", "position", "z_map"),
        **options,
    )


def test_images_of_both_folders_without_any_mask(tmp_path, monkeypatch):
    labeled = labeled_cases(tmp_path / "tr", PLAIN, 2)
    unlabeled = unlabeled_cases(tmp_path / "un", 2)
    folders = dict.fromkeys(unlabeled.identifiers, tmp_path / "un")
    folders |= dict.fromkeys(labeled.identifiers, tmp_path / "tr")
    opened = []
    original = blosc2.open
    monkeypatch.setattr(
        blosc2, "open", lambda urlpath, **k: opened.append(urlpath) or original(urlpath, **k)
    )
    dataset = ImageDataset(folders)
    assert list(dataset.identifiers) == ["tr_000", "tr_001", "un_000", "un_001"]
    for case in dataset.identifiers:
        data, seg, previous, properties = dataset.load_case(case)
        assert data.shape[1:] == SHAPE and seg.shape == (1, *SHAPE) and (seg == 0).all()
        assert previous is None and properties["class_locations"] is None
    assert len(opened) == 4 and not any(path.endswith("_seg.b2nd") for path in opened)
    original_image = labeled.load_case("tr_001")[0][:]
    assert np.array_equal(dataset.load_case("tr_001")[0][:], original_image)


@pytest.mark.parametrize(("samples", "scans"), [(12, 4), (10, 4), (5, 2), (2, 2), (1, 1), (24, 8)])
def test_a_2d_batch_takes_all_parts_of_some_scans(samples, scans, tmp_path):
    loader = contrast_loader(images(tmp_path), (10, 12), still((10, 12)), samples)
    for _ in range(3):
        batch = next(loader)
        assert batch["data"].shape == (2 * samples, 5, 10, 12)
        drawn = list(zip(batch["keys"], batch["meta"]["position"][:, 0].tolist(), strict=True))
        assert drawn[:samples] == drawn[samples:]  # both views of a slice
        per_scan = -(-samples // scans)
        for first in range(0, samples, per_scan):
            group = drawn[first : min(first + per_scan, samples)]
            assert len({key for key, _ in group}) == 1
            assert len({int(3 * z) for _, z in group}) == len(group)
        if scans <= 5:
            assert len(set(batch["keys"])) == scans
        for i in range(2 * samples):
            inside = batch["valid"][i, 0]
            slices = batch["meta"]["position"][i, 0] * SHAPE[0] + 0.5
            assert loader.indices[batch["meta"]["case"][i]] == batch["keys"][i]
            assert inside.any() and slices == round(slices.item())


def test_views_of_a_slice_differ_in_place_and_look(tmp_path):
    patch = (6, 6)
    cases = images(tmp_path)
    plain = contrast_loader(cases, patch, still(patch), 6)
    plain.pipeline.intensity = []
    batch = next(plain)
    a, b = batch["data"].chunk(2)
    assert torch.equal(a[:, Z], b[:, Z]) and torch.equal(a[:, CASE], b[:, CASE])
    assert not torch.equal(a[:, Y], b[:, Y]) and not torch.equal(a[:, X], b[:, X])
    changed = next(contrast_loader(cases, patch, still(patch), 6))["data"]
    assert (changed[:, CASE] % 1 != 0).any()  # the intensity augmentation of nnU-Net


def test_a_3d_batch_takes_one_patch_a_scan_and_the_same_slices_for_both_views(tmp_path):
    patch = (4, 6, 6)
    loader = contrast_loader(images(tmp_path), patch, still(patch), 5)
    firsts = set()
    for _ in range(4):
        batch = next(loader)
        assert len(set(batch["keys"][:5])) == 5 and list(batch["keys"][:5]) == list(
            batch["keys"][5:]
        )
        a, b = batch["meta"]["z_map"].chunk(2)
        assert torch.equal(a, b)
        firsts |= set(a[:, 0, 0, 0, 0].tolist())
        y, x = (batch["meta"]["position"][:, k].view(2, 5) for k in (1, 2))
        assert not torch.equal(y[0], y[1]) or not torch.equal(x[0], x[1])
    assert len(firsts) > 4


def test_fewer_slices_than_parts(tmp_path):
    cases = images(tmp_path, shape=(2, 14, 16))
    batch = next(contrast_loader(cases, (8, 8), still((8, 8)), 6, parts=3))
    assert set(batch["meta"]["position"][:, 0].tolist()) <= {0.25, 0.75}
    single = images(tmp_path / "flat", shape=(1, 14, 16))
    batch = next(contrast_loader(single, (8, 8), still((8, 8)), 6, parts=3))
    assert (batch["meta"]["position"][:, 0] == 0.5).all()


def test_outside_of_nnunets_mask_is_known_from_the_image(tmp_path):
    folder = tmp_path / "un"
    cases = images(folder)
    for case in cases.identifiers:
        data = blosc2.open(str(folder / f"{case}.b2nd"), mode="a")
        array = data[:]
        array[:, :, : SHAPE[1] // 2] = 0
        data[:] = array
    patch = (12, 14)
    masks = (True,) * 5
    made = transforms(patch, mask=masks)
    batch = next(contrast_loader(cases, patch, made, 6, masked=masks))
    outside = ~batch["valid"].expand_as(batch["data"])
    assert outside.any() and (batch["data"][outside] == 0).all()
    unmasked = next(contrast_loader(cases, patch, made, 6))
    assert unmasked["valid"].float().mean() > batch["valid"].float().mean()


def test_validation_batches_have_one_view_as_it_is(tmp_path):
    batch = next(contrast_loader(images(tmp_path), (6, 6), still((6, 6)), 6, views=1))
    assert batch["data"].shape == (6, 5, 6, 6) and (batch["data"] == batch["data"].round()).all()


def test_an_empty_labeled_batch_beside_it(tmp_path):
    loader = contrast_loader(images(tmp_path), (6, 6), still((6, 6)), 3)
    streams = pickle.loads(pickle.dumps(NoPatches(5, (6, 6)))), loader
    batch = next(TwoStreamLoader(*streams))
    assert batch["data"].shape == (0, 5, 6, 6) and batch["keys"] == []
    assert batch["unlabeled"]["data"].shape == (6, 5, 6, 6)


@pytest.mark.parametrize(
    ("patch", "most", "firsts"),
    [
        ((6, 8), 4, [0, 4, 7, 11]),
        ((6, 8), 99, list(range(12))),
        ((5, 6, 8), 9, [0, 4, 7]),
        ((16, 18, 20), 9, [-2]),
    ],
)
def test_regular_patches_cover_the_scan(patch, most, firsts, tmp_path):
    cases = images(tmp_path, 2)
    found = list(regular_patches(cases, patch, most))
    assert [case for case, _, _ in found] == sorted(list(cases.identifiers) * len(firsts))
    depth = patch[0] if len(patch) == 3 else 1
    for (case, image, z), first in zip(found, firsts * 2, strict=True):
        assert image.shape == (5, *patch)
        torch.testing.assert_close(z, (torch.arange(depth) + first + 0.5) / SHAPE[0])
        middle = image.reshape(5, depth, *patch[-2:])[:, :, patch[-2] // 2, patch[-1] // 2]
        inside = (z > 0) & (z < 1)
        assert torch.equal(middle[Z][inside], (torch.arange(depth) + first + 1.0)[inside])
        assert (middle[CASE][inside] == cases.identifiers.index(case) + 1).all()
        assert (middle[ONE][~inside] == 0).all()


def test_scans_stored_the_other_way_round_are_turned(tmp_path):
    cases = images(tmp_path, 2)
    path = str(tmp_path / "un_001.pkl")
    turned = {"sitk_stuff": {"direction": (1, 0, 0, 0, 1, 0, 0, 0, -1)}}
    write_pickle(load_pickle(path) | turned, path)
    (_, _, a), (_, _, b) = regular_patches(cases, (5, 6, 8), 1)
    torch.testing.assert_close(b, 1 - a)
