"""The two streams and what they tell of each patch."""

import multiprocessing
import os
import pickle

import numpy as np
import pytest
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.utilities.file_and_folder_operations import load_pickle, write_pickle
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ssl.data.batch import Batch
from nnunet_ssl.data.loader import (
    PatchLoader,
    TwoStreamLoader,
    has_column,
    read_case_labels,
    read_case_table,
    runs_backwards,
)
from nnunet_ssl.data.unlabeled import UnlabeledDataset
from nnunet_ssl.data.views import Pipeline
from nnunet_ssl.errors import UserError

from .cases import (
    IGNORE,
    PLAIN,
    REGIONS,
    REGIONS_IGNORE,
    SHAPE,
    draw_in_child,
    labeled_cases,
    still,
    swap_intensity,
    transforms,
    unlabeled_cases,
    unlabeled_loader,
)

Z, Y, X, CASE, ONE = range(5)


@pytest.fixture(autouse=True)
def seeded():
    np.random.seed(0)
    torch.manual_seed(0)


def equal(a, b):
    if isinstance(a, list):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a.dtype == b.dtype and torch.equal(a, b)


# ---------------------------------------------------------------- labelled stream


@pytest.mark.parametrize("meta", [(), ("case", "position", "z_map")])
@pytest.mark.parametrize(
    ("labels", "initial", "patch", "options", "probabilistic"),
    [
        (PLAIN, (12, 14, 14), (8, 12, 12), {"scales": [[1, 1, 1], [0.5, 0.5, 0.5]]}, False),
        (PLAIN, (18, 20, 22), (16, 18, 20), {}, True),
        (PLAIN, (4, 18, 18), (4, 12, 12), {"dummy_2d": True}, False),
        (PLAIN, (16, 16), (12, 12), {"scales": [[1, 1], [0.5, 0.5]]}, False),
        (PLAIN, (12, 14, 14), (8, 12, 12), {"mask": [True, False]}, False),
        (REGIONS, (12, 14, 14), (8, 12, 12), {"scales": [[1, 1, 1], [0.5, 0.5, 0.5]]}, False),
        (IGNORE, (12, 14, 14), (8, 12, 12), {}, False),
        (REGIONS_IGNORE, (16, 16), (12, 12), {}, True),
    ],
)
def test_labeled_stream_is_stock_nnunet_bit_for_bit(
    labels, initial, patch, options, probabilistic, meta, tmp_path
):
    cases = labeled_cases(tmp_path, labels)
    sizes = (cases, 3, initial, patch, labels)
    oversample = {"oversample_foreground_percent": 0.5, "probabilistic_oversampling": probabilistic}
    ours = PatchLoader(
        *sizes, Pipeline(transforms(patch, labels, **options), True), meta=meta, **oversample
    )
    stock = nnUNetDataLoader(*sizes, transforms=transforms(patch, labels, **options), **oversample)
    batches = {}
    for name, loader in (("ours", ours), ("stock", stock)):
        np.random.seed(7)
        torch.manual_seed(7)
        batches[name] = [next(loader) for _ in range(4)]
    for a, b in zip(batches["ours"], batches["stock"], strict=True):
        assert list(a["keys"]) == list(b["keys"])
        assert equal(a["data"], b["data"])
        assert equal(a["target"], b["target"])
    assert not torch.equal(batches["ours"][0]["data"], batches["ours"][1]["data"])
    if probabilistic:
        assert len({tuple(b["forced_fg"].tolist()) for b in batches["ours"]}) > 1
    else:  # round(3 * 0.5) patches are free
        assert all(b["forced_fg"].tolist() == [False, False, True] for b in batches["ours"])


@pytest.mark.parametrize(
    ("dataset", "configuration"), [("Toy", "3d_fullres"), ("RegionsIgnore", "2d")]
)
def test_trainer_feeds_the_labeled_batches_of_stock_nnunet(
    dataset, configuration, make_trainer, monkeypatch
):
    original = GaussianBlurTransform.__init__
    monkeypatch.setattr(
        GaussianBlurTransform,
        "__init__",
        lambda self, *a, **k: original(self, *a, **{**k, "benchmark": False}),
    )
    trainer = make_trainer("SSLTrainer", dataset, configuration)
    trainer.initialize()
    batches = []
    for source in (type(trainer), nnUNetTrainer):
        loader, _ = source.get_dataloaders(trainer)
        np.random.seed(3)
        torch.manual_seed(3)
        batches.append(next(loader))
    assert equal(batches[0]["data"], batches[1]["data"])
    assert equal(batches[0]["target"], batches[1]["target"])


def test_valid_of_labeled_patches_is_false_on_padding_alone(tmp_path):
    patch = (16, 18, 20)  # larger than the case
    cases = labeled_cases(tmp_path, PLAIN)
    loader = PatchLoader(cases, 2, patch, patch, PLAIN, Pipeline(still(patch), True))
    seg = torch.from_numpy(cases.load_case("tr_000")[1][:])
    expected = torch.zeros(1, *patch, dtype=torch.bool)
    expected[:, 2:14, 2:16, 2:18] = seg >= 0
    batch = next(loader)
    assert batch["valid"].dtype == torch.bool
    for valid in batch["valid"]:
        assert torch.equal(valid, expected)
    assert (batch["target"] >= 0).all()


# ---------------------------------------------------------------- unlabelled stream


@pytest.mark.parametrize("patch", [(8, 10, 12), (16, 18, 20), (10, 12)])
def test_weak_view_is_the_raw_crop_if_geometry_stands_still(patch, tmp_path):
    cases = unlabeled_cases(tmp_path)
    raw = [torch.from_numpy(cases.load_case(c)[0][:]) for c in cases.identifiers]
    loader = unlabeled_loader(cases, patch, still(patch), meta=("case", "position", "z_map"))
    size = (1, *patch) if len(patch) == 2 else patch
    for _ in range(4):
        batch = next(loader)
        assert batch["data"].shape == (3, 5, *patch)
        for i in range(3):
            assert loader.indices[batch["meta"]["case"][i]] == batch["keys"][i]
            center = batch["meta"]["position"][i] * torch.tensor(SHAPE)
            lower = (center - torch.tensor(size) / 2).round().int().tolist()
            expected = torch.zeros(5, *size)
            for index in np.ndindex(*size):  # naive crop with zeros outside
                place = tuple(a + b for a, b in zip(lower, index, strict=True))
                if all(0 <= p < s for p, s in zip(place, SHAPE, strict=True)):
                    expected[(slice(None), *index)] = raw[batch["meta"]["case"][i]][
                        (slice(None), *place)
                    ]
            expected = expected.reshape(5, *patch)
            assert torch.equal(batch["data"][i], expected)
            assert torch.equal(batch["valid"][i, 0], expected[ONE] == 1)
            z_map = batch["meta"]["z_map"][i]
            inside = batch["valid"][i]
            truth = (expected[Z : Z + 1] - 0.5) / SHAPE[0]
            torch.testing.assert_close(z_map[inside], truth[inside], atol=1e-6, rtol=0)
            if len(patch) == 3:
                assert all(len(z.unique()) == 1 for z in z_map[0])
            assert z_map.min() >= 0 and z_map.max() <= 1


def test_position_is_the_center_of_a_larger_initial_patch_too(tmp_path):
    patch, initial = (4, 6, 6), (9, 11, 12)
    loader = unlabeled_loader(
        unlabeled_cases(tmp_path), patch, still(patch), meta=("position",), initial=initial
    )
    for _ in range(10):
        batch = next(loader)
        assert ((batch["meta"]["position"] >= 0) & (batch["meta"]["position"] <= 1)).all()
        for i in range(3):
            ones = batch["data"][i, ONE]
            if (ones == 1).all():  # a crop without padding tells where its middle is
                middle = batch["data"][i, :3].mean((1, 2, 3)) - 0.5
                center = batch["meta"]["position"][i] * torch.tensor(SHAPE)
                # an odd difference of sizes cannot be split evenly
                assert (middle - center).abs().max() <= 0.5 + 1e-4


@pytest.mark.parametrize(
    ("patch", "initial", "dummy_2d"),
    [
        ((8, 10, 12), (12, 14, 16), False),
        ((12, 14, 16), (12, 14, 16), False),  # turned corners reach outside the crop
        ((4, 12, 12), (4, 16, 16), True),
        ((12, 12), (12, 12), False),
    ],
)
def test_z_map_travels_with_the_voxels(patch, initial, dummy_2d, tmp_path):
    made = transforms(patch, dummy_2d=dummy_2d)
    for step in made.transforms:
        if isinstance(step, SpatialTransform):
            step.p_rotation = step.p_scaling = 1
    loader = unlabeled_loader(
        unlabeled_cases(tmp_path), patch, made, meta=("z_map",), initial=initial
    )
    outside = 0
    for _ in range(6):
        batch = next(loader)
        z_map, valid = batch["meta"]["z_map"][:, 0], batch["valid"][:, 0]
        ones = batch["data"][:, ONE]
        whole = (ones > 1 - 1e-5) & valid  # interpolated from voxels of the case alone
        assert whole.any()
        truth = (batch["data"][:, Z] / ones.clamp(min=1e-3) - 0.5) / SHAPE[0]
        torch.testing.assert_close(z_map[whole], truth[whole], atol=1e-5, rtol=0)
        # at the rim: within the voxel
        rim = valid & ~whole & (ones > 0.1)
        outside += int(rim.sum())
        assert ((z_map - truth).abs()[rim] <= 0.5 / SHAPE[0] + 1e-4).all()
        assert z_map.min() >= 0 and z_map.max() <= 1
    assert outside or patch == (8, 10, 12)


def test_unlabeled_stream_changes_no_intensity(tmp_path):
    patch = (6, 8, 8)
    made = transforms(patch)
    loader = unlabeled_loader(unlabeled_cases(tmp_path, 1), patch, made, initial=(12, 14, 16))
    for _ in range(20):
        data, valid = (next(loader)[k] for k in ("data", "valid"))
        # constant channels stay constant inside, whatever the geometry
        inside = (data[:, ONE : ONE + 1] > 1 - 1e-5) & valid
        assert ((data[:, CASE : CASE + 1] - 1).abs()[inside] < 1e-4).all()
        assert data[:, Z].max() <= SHAPE[0] + 1e-3


@pytest.mark.parametrize("labels", [PLAIN, IGNORE, REGIONS_IGNORE])
def test_unlabeled_stream_forces_nothing_and_needs_no_class_locations(labels, tmp_path):
    patch = (8, 10, 12)
    cases = unlabeled_cases(tmp_path)
    assert cases.load_case("un_000")[3] == {"class_locations": None}
    loader = unlabeled_loader(cases, patch, transforms(patch, labels), labels=labels)
    for _ in range(3):
        batch = next(loader)
        assert batch["forced_fg"].tolist() == [False] * 3
        assert batch["data"].dtype == torch.float32
        assert set(batch["target"].unique().tolist()) <= {-1, 0}


def test_unlabeled_places_follow_stock_nnunet_without_forced_foreground(tmp_path):
    """The crop is as random as nnU-Net's: all corners of the case are reached."""
    patch = (4, 4, 4)
    loader = unlabeled_loader(unlabeled_cases(tmp_path, 1), patch, still(patch), meta=("position",))
    positions = torch.cat([next(loader)["meta"]["position"] for _ in range(100)])
    lowest = torch.tensor([2 / s for s in SHAPE])
    torch.testing.assert_close(positions.min(0).values, lowest)
    torch.testing.assert_close(positions.max(0).values, 1 - lowest)


# ---------------------------------------------------------------- views


def test_stock_view_without_intensity_transforms_is_the_weak_view(tmp_path):
    patch = (8, 10, 12)
    loader = unlabeled_loader(
        unlabeled_cases(tmp_path), patch, swap_intensity(transforms(patch)), ("stock",)
    )
    for _ in range(4):
        batch = next(loader)
        assert torch.equal(batch["views"]["stock"], batch["data"])


def test_stock_view_has_the_geometry_of_the_weak_view_and_leaves_it_alone(tmp_path):
    patch = (8, 10, 12)
    brighter = MultiplicativeBrightnessTransform(
        multiplier_range=(1.5, 2.0), synchronize_channels=True, p_per_channel=1
    )
    loader = unlabeled_loader(
        unlabeled_cases(tmp_path), patch, swap_intensity(transforms(patch), [brighter]), ("stock",)
    )
    for _ in range(4):
        batch = next(loader)
        assert batch["data"][:, CASE].max() <= 3 + 1e-4
        for weak, stock in zip(batch["data"], batch["views"]["stock"], strict=True):
            factor = stock[ONE].max() / weak[ONE].max()
            assert 1.5 - 1e-4 <= factor <= 2 + 1e-4
            torch.testing.assert_close(stock, factor * weak)


def test_stock_view_applies_nnunets_intensity_transforms(tmp_path):
    patch = (8, 10, 12)
    loader = unlabeled_loader(unlabeled_cases(tmp_path), patch, still(patch), ("stock",))
    changed = 0
    for _ in range(10):
        batch = next(loader)
        weak, stock = batch["data"], batch["views"]["stock"]
        changed += sum(not torch.equal(a, b) for a, b in zip(weak, stock, strict=True))
    assert 10 < changed <= 30  # each patch stays unchanged with a probability of about a quarter


@pytest.mark.parametrize("patch", [(8, 10, 12), (8, 8)])
@pytest.mark.parametrize("views", [("second",), ("stock", "second")])
def test_second_view_is_another_place_of_the_same_case(views, patch, tmp_path):
    made = swap_intensity(still(patch))
    loader = unlabeled_loader(unlabeled_cases(tmp_path), patch, made, views, ("case",))
    moved, seen = 0, set()
    for _ in range(6):
        batch = next(loader)
        second = batch["views"]["second"]
        assert torch.equal(second[:, CASE], batch["data"][:, CASE])
        cases = [int(c) - 1 for c in batch["data"][:, CASE].flatten(1).max(1).values]
        assert batch["meta"]["case"].tolist() == cases
        assert [int(k[-3:]) for k in batch["keys"]] == cases
        seen.add(tuple(cases))
        moved += sum(not torch.equal(a, b) for a, b in zip(second, batch["data"], strict=True))
        if "stock" in views:
            assert torch.equal(batch["views"]["stock"], batch["data"])
    assert moved > 12
    assert len(seen) > 1  # the ids are drawn anew for each batch


@pytest.mark.parametrize("patch", [(8, 10, 12), (10, 12)])
def test_masked_channels_are_0_outside_the_mask_in_every_view(patch, tmp_path):
    noise = GaussianNoiseTransform(noise_variance=(0.1, 0.2), p_per_channel=1)
    made = transforms(patch, mask=[True, False, False, False, False])
    loader = unlabeled_loader(
        unlabeled_cases(tmp_path, hole=True), patch, swap_intensity(made, [noise]), ("stock",)
    )
    counted = 0
    for _ in range(4):
        batch = next(loader)
        outside = ~batch["valid"][:, 0]
        counted += int(outside.sum())
        for image in (batch["data"], batch["views"]["stock"]):
            assert (image[:, 0][outside] == 0).all()
        assert (batch["views"]["stock"][:, 1][outside] != 0).all()  # noise, not masked
        assert (batch["data"][:, 0] != 0).any()
    assert counted


def test_second_view_is_masked_by_its_own_mask(tmp_path):
    patch = (8, 10, 12)
    made = still(patch, mask=[True, False, False, False, False])
    loader = unlabeled_loader(unlabeled_cases(tmp_path, hole=True), patch, made, ("second",))
    for _ in range(4):
        second = next(loader)["views"]["second"]
        masked = second[:, Y] <= SHAPE[1] // 2  # channel Y counts from 1
        assert masked.any() and not masked.all()
        assert torch.equal(second[:, 0] == 0, masked)


# ---------------------------------------------------------------- direction of the slices


@pytest.mark.parametrize(
    ("properties", "axes"),
    [
        ({}, []),
        ({"sitk_stuff": {"direction": (1, 0, 0, 1)}}, []),  # 2D
        ({"sitk_stuff": {"direction": (1, 0, 0, 0, 1, 0, 0, 0, -1)}}, [0]),
        ({"sitk_stuff": {"direction": (-1, 0, 0, 0, -1, 0, 0, 0, 1)}}, [1, 2]),
        ({"sitk_stuff": {"direction": (0.1, 0, 0.9, 0.9, 0, 0.1, 0, -1, 0)}}, [1]),
        ({"nibabel_stuff": {"original_affine": np.diag([2, 2, -3, 1])}}, [0]),
        (
            {
                "nibabel_stuff": {
                    "original_affine": np.diag([2, 2, -3, 1]),
                    "reoriented_affine": np.diag([2, 2, 3, 1]),
                }
            },
            [],
        ),
    ],
)
def test_axes_that_run_backwards(properties, axes):
    assert [a for a in range(3) if runs_backwards(properties, a)] == axes


@pytest.mark.parametrize("patch", [(8, 10, 12), (10, 12)])
def test_positions_follow_the_scanner_and_not_the_file(patch, tmp_path):
    cases = unlabeled_cases(tmp_path)
    path = str(tmp_path / "un_001.pkl")
    turned = {"sitk_stuff": {"direction": (1, 0, 0, 0, 1, 0, 0, 0, -1)}}
    write_pickle(load_pickle(path) | turned, path)
    loader = unlabeled_loader(cases, patch, still(patch), meta=("case", "position", "z_map"))
    seen = set()
    for _ in range(4):
        batch = next(loader)
        for i, key in enumerate(batch["keys"]):
            inside = batch["valid"][i, 0]
            z = (batch["data"][i, Z][inside] - 0.5) / SHAPE[0]
            along = batch["meta"]["z_map"][i, 0][inside]
            torch.testing.assert_close(along, 1 - z if key == "un_001" else z)
            torch.testing.assert_close(batch["meta"]["position"][i, 0], along.mean())
            seen.add(key)
    assert len(seen) == 3


# ---------------------------------------------------------------- columns of a table


def test_any_text_is_a_label(tmp_path):
    path = tmp_path / "cases.csv"
    path.write_text("case,phase,site\na,ED, 7\nb,ES,12\nc,ED,\nd,x,7\n")
    assert read_case_labels(path, ["phase", "site"], ["a", "b", "c"]) == {
        "a": {"phase": 0, "site": 1},
        "b": {"phase": 1, "site": 0},
        "c": {"phase": 0, "site": -1},
    }
    assert read_case_labels(tmp_path / "none.csv", [], ["a"]) == {}
    with pytest.raises(UserError, match=r"cases\.csv has no column 'age'.*Add it"):
        read_case_labels(path, ["age"], ["a"])
    with pytest.raises(UserError, match=r"cases\.csv has no row for case 'e'"):
        read_case_labels(path, ["phase"], ["e"])
    assert has_column(path, "site") and not has_column(path, "age")
    assert not has_column(tmp_path / "none.csv", "site")


def test_columns_of_the_table_follow_the_cases(tmp_path):
    path = tmp_path / "cases.csv"
    path.write_text("case,age,dose\nun_002,30,0.5\nun_000,10,1e-3\nun_001,20,-1\nother,x,\n")
    cases = unlabeled_cases(tmp_path / "un")
    table = read_case_table(path, ["age", "dose"], cases.identifiers)
    patch = (4, 6, 6)
    loader = unlabeled_loader(cases, patch, still(patch), meta=("dose", "age"), table=table)
    truth = {"un_000": (10, 1e-3), "un_001": (20, -1), "un_002": (30, 0.5)}
    for _ in range(3):
        batch = next(loader)
        assert set(batch["meta"]) == {"age", "dose"}
        for i, case in enumerate(batch["keys"]):
            found = (batch["meta"]["age"][i].item(), batch["meta"]["dose"][i].item())
            assert found == pytest.approx(truth[case])


def test_a_table_saved_by_a_spreadsheet_reads_the_same(tmp_path):
    path = tmp_path / "cases.csv"
    path.write_bytes("case,age,remark\r\na,1,é\r\nb,2,\r\n".encode("utf-8-sig"))
    assert read_case_table(path, ["age"], ["a", "b"]) == {"a": {"age": 1.0}, "b": {"age": 2.0}}
    assert read_case_table(tmp_path / "none.csv", [], ["a"]) == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["is missing", "case, age"]),
        ("", ["no column 'case'"]),
        ("case;age\na;1\n", ["no column 'case'", "case;age", "commas"]),
        ("name,age\na,1\n", ["no column 'case'", "name, age", "Add it"]),
        ("case,years\na,1\n", ["no column 'age'", "case, years", "Add it"]),
        ("case,age\nb,1\n", ["no row for case 'a'", "Add it"]),
        ("case,age\na,\n", ["case 'a'", "age must hold numbers"]),
        ("case,age\na\n", ["case 'a'", "age must hold numbers"]),
        ("case,age\na,old\n", ["case 'a'", "age must hold numbers"]),
        ("case,age\na,nan\n", ["case 'a'", "age must hold numbers"]),
        (b"case,age\na,\xe9\n", ["UTF-8"]),
    ],
)
def test_errors_of_the_table_name_file_and_fix(text, words, tmp_path):
    path = tmp_path / "cases.csv"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        read_case_table(path, ["age"], ["a"])
    for word in [str(path), *words]:
        assert word in str(error.value)


# ---------------------------------------------------------------- two streams


@pytest.fixture
def two_streams(tmp_path):
    patch = (8, 10, 12)
    labeled = PatchLoader(
        labeled_cases(tmp_path / "tr", PLAIN),
        2,
        patch,
        patch,
        PLAIN,
        Pipeline(transforms(patch, scales=[[1, 1, 1], [0.5] * 3]), True),
        meta=("case",),
    )
    unlabeled = unlabeled_loader(
        unlabeled_cases(tmp_path / "un"), patch, transforms(patch), ("stock",), ("z_map",)
    )
    return TwoStreamLoader(labeled, unlabeled)


def test_unlabeled_patches_come_only_while_active(two_streams, monkeypatch):
    assert "unlabeled" in next(two_streams)  # active unless told otherwise
    two_streams.active.value = False
    monkeypatch.setattr(two_streams.unlabeled._data, "load_case", None)  # opening one would raise
    assert "unlabeled" not in next(two_streams)
    alone = TwoStreamLoader(two_streams.labeled)
    assert not alone.active.value
    assert "unlabeled" not in next(alone)


def test_batch_holds_both_streams_without_any_target_of_the_unlabeled(two_streams):
    raw = next(two_streams)
    assert "target" not in raw["unlabeled"]
    batch = Batch.from_loader(raw, torch.device("cpu"))
    assert batch.x_l.shape == (2, 2, 8, 10, 12) and batch.x_u.shape == (3, 5, 8, 10, 12)
    assert [tuple(y.shape[2:]) for y in batch.y_l] == [(8, 10, 12), (4, 5, 6)]
    assert torch.equal(batch.target, raw["target"][0])
    assert batch.valid_l.shape == (2, 1, 8, 10, 12) and batch.valid_u.shape == (3, 1, 8, 10, 12)
    assert batch.keys_l == list(raw["keys"]) and batch.keys_u == list(raw["unlabeled"]["keys"])
    assert set(batch.views) == {"stock"} and set(batch.meta_u) == {"z_map"}
    assert batch.meta_l["case"].dtype == torch.int64
    del raw["unlabeled"]
    batch = Batch.from_loader(raw, torch.device("cpu"))
    assert batch.x_u is None and batch.keys_u == [] and batch.views == {}


def test_active_is_seen_by_worker_processes(two_streams):
    two_streams.active.value = False
    augmenter = NonDetMultiThreadedAugmenter(
        two_streams, None, num_processes=1, num_cached=1, seeds=None, wait_time=0.002
    )
    try:
        assert "unlabeled" not in next(augmenter)
        for wanted in (True, False):
            two_streams.active.value = wanted
            # the few batches made before the change come first
            for _ in range(8):
                batch = next(augmenter)
                if ("unlabeled" in batch) == wanted:
                    break
            assert all(("unlabeled" in next(augmenter)) == wanted for _ in range(3))
    finally:
        augmenter._finish()


def test_loaders_reach_spawned_workers(two_streams):
    copy = pickle.loads(pickle.dumps(two_streams.unlabeled))
    batches = []
    for loader in (two_streams.unlabeled, copy):
        np.random.seed(5)
        torch.manual_seed(5)
        batches.append(next(loader))
    assert equal(batches[0]["data"], batches[1]["data"])
    assert equal(batches[0]["meta"]["z_map"], batches[1]["meta"]["z_map"])

    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    both = TwoStreamLoader(two_streams.labeled, two_streams.unlabeled, context.Value("b", True))
    child = context.Process(target=draw_in_child, args=(both, queue))
    child.start()
    try:
        labeled, unlabeled = queue.get(timeout=300)
    finally:
        child.join(10)
        child.kill()
    assert set(labeled) <= set(two_streams.labeled.indices)
    assert set(unlabeled) <= set(two_streams.unlabeled.indices)


def test_cases_are_opened_when_drawn_and_closed_after(tmp_path, monkeypatch):
    import blosc2

    patch = (4, 6, 6)
    unlabeled_cases(tmp_path, 1)
    names = [f"case_{i:04d}" for i in range(1000)]
    for name in names:
        for ending in (".b2nd", "_seg.b2nd", ".pkl"):
            os.link(tmp_path / f"un_000{ending}", tmp_path / f"{name}{ending}")
    opened = []
    original = blosc2.open

    def count(urlpath, *args, **kwargs):
        opened.append(os.path.basename(urlpath))
        return original(urlpath, *args, **kwargs)

    monkeypatch.setattr(blosc2, "open", count)
    loader = unlabeled_loader(UnlabeledDataset(str(tmp_path), names), patch, still(patch))
    twice = unlabeled_loader(
        UnlabeledDataset(str(tmp_path), names), patch, still(patch), ("second",)
    )
    assert opened == []
    drawn = []
    for _ in range(20):
        del opened[:]
        drawn += list(next(loader)["keys"])
        assert len(opened) == 2 * 3  # image and padding mask of three patches
    assert len(set(drawn)) > 40  # of 60 from 1000
    del opened[:]
    next(twice)
    assert len(opened) == 2 * 2 * 3
    if os.path.exists("/proc/self/maps"):
        with open("/proc/self/maps") as f:
            mapped = {line.split()[-1] for line in f if ".b2nd" in line}
        assert len(mapped) <= 2 * 3
