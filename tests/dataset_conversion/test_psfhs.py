"""PSFHS: colour planes, 2D masks, frames of one video."""

import json

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_ssl.dataset_conversion import main
from nnunet_ssl.dataset_conversion.PSFHS import group_frames
from nnunet_ssl.dataset_conversion.selection import by_hash
from nnunet_ssl.errors import UserError

from .conftest import names

SIDE = 128  # two pixels for one of the reduced image
VIDEOS = {"03744": 0, "03745": 0, "03746": 1, "03747": 2, "03750": 0, "03751": 3}


def frame(video, seed, noise=20):
    """Same smooth pattern for all frames of a video, with noise of their own."""
    coarse = np.random.default_rng(video).integers(40, 200, (16, 16))
    own = np.random.default_rng(1000 + seed).normal(0, noise, (SIDE, SIDE))
    return np.clip(np.kron(coarse, np.ones((8, 8))) + own, 0, 255).astype(np.uint8)


@pytest.fixture
def release(tmp_path, write):
    """Six pairs; 03744, 03745 and 03750 are frames of one video."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[10:30, 10:30], mask[50:100, 50:100] = 1, 2
    for seed, (name, video) in enumerate(VIDEOS.items()):
        plane = frame(video, seed)
        write(np.stack([plane] * 3), tmp_path / "src" / "PSFHS" / "image_mha" / f"{name}.mha")
        write(mask, tmp_path / "src" / "PSFHS" / "label_mha" / f"{name}.mha")
    return tmp_path / "src"


def run(source, *options):
    return main(["PSFHS", "-i", str(source), "-d", "5", "-np", "1", *map(str, options)])


def load(folder):
    return json.loads((folder / "conversion.json").read_text(encoding="utf-8"))


def test_planes_masks_and_groups(release, raw_root, heldout):
    run(release, "--labeled", 3, "--test", 1)
    folder = raw_root / "Dataset005_PSFHS_3labeled"
    record = load(folder)
    members = {
        "03744": ["03744", "03745", "03750"],
        **{c: [c] for c in ("03746", "03747", "03751")},
    }
    order = [c for g in by_hash(members) for c in members[g]]
    test = sorted(members[by_hash(members)[-1]])
    assert record["order"] == [c for c in order if c not in test]
    assert record["splits"]["test"] == test
    assert record["groups"]["03750"] == record["groups"]["03745"] == "03744"
    assert names(heldout / folder.name / "test_images") == [
        f"{c}_0000.nii.gz" for c in sorted(test)
    ]
    assert record["spacing_known"] is False
    name = record["labeled"][0]
    image = sitk.ReadImage(str(folder / "imagesTr" / f"{name}_0000.nii.gz"))
    mask = sitk.ReadImage(str(folder / "labelsTr" / f"{name}.nii.gz"))
    assert image.GetSize() == mask.GetSize() == (SIDE, SIDE)
    np.testing.assert_array_equal(
        sitk.GetArrayFromImage(image), frame(VIDEOS[name], list(VIDEOS).index(name))
    )
    assert np.unique(sitk.GetArrayFromImage(mask)).tolist() == [0, 1, 2]


def test_groups_equal_naive_chains(tmp_path, write):
    """Frames fade from one pattern into another, so that only neighbours are alike."""
    a, b = (frame(video, 0, noise=0).astype(float) for video in (0, 1))
    weights = [0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1]
    images = [np.rint((1 - w) * a + w * b).astype(np.uint8) for w in weights]
    images += [frame(2, 1), frame(2, 2, noise=30), 7 + np.zeros_like(images[0])]
    paths = [write(x, tmp_path / f"{i:02d}.mha") for i, x in enumerate(images)]
    small = [x.reshape(64, 2, 64, 2).mean(axis=(1, 3)).ravel() for x in images]
    group = list(range(len(images)))
    with np.errstate(all="ignore"):
        alike = np.corrcoef(small) > 0.9
    for i, j in np.argwhere(alike):
        group = [min(group[i], group[j]) if g in (group[i], group[j]) else g for g in group]
    assert group_frames(paths) == [f"{g:02d}" for g in group]
    assert not alike[0, 7]
    assert group[7] == 0


def test_lists_may_part_frames_that_look_alike(release, raw_root, heldout, tmp_path, capsys):
    """03744, 03745 and 03750 are alike, 03747 and 03751 are equal; others chose the test cases."""
    folder = release / "PSFHS" / "image_mha"
    (folder / "03751.mha").write_bytes((folder / "03747.mha").read_bytes())
    (tmp_path / "train.list").write_text("03745\n03751\n03744\n03746\n")
    (tmp_path / "test.list").write_text("03750\n03747\n")
    lists = ("--list", tmp_path / "train.list", "--test", tmp_path / "test.list")
    run(release, *lists, "--labeled", 2)
    made = load(raw_root / "Dataset005_PSFHS_2labeled")
    assert made["order"] == ["03745", "03744", "03746"]
    assert made["splits"]["test"] == ["03750", "03747"]
    assert made["dropped"] == ["03751"]
    assert made["labeled"] == ["03745", "03744"]
    assert made["notes"] == {"03750": {"training_cases_of_its_group": ["03745", "03744"]}}
    told = capsys.readouterr().out
    assert "1 groups of near-identical images stand on both sides" in told
    assert "2 for training, 1 held out; for example 03745 and 03750" in told
    assert names(heldout / "Dataset005_PSFHS_2labeled" / "test_labels") == [
        "03747.nii.gz",
        "03750.nii.gz",
    ]
    run(release, *lists[2:], "-d", 6)
    assert load(raw_root / "Dataset006_PSFHS")["notes"].keys() == {"03750"}
    (tmp_path / "train.list").write_text("03745\n03750\n")
    with pytest.raises(UserError, match="03750 is in both lists, train and test"):
        run(release, *lists, "-d", 7)


def test_copies_and_unequal_planes(release, raw_root, write):
    folder = release / "PSFHS" / "image_mha"
    planes = np.stack([frame(1, 2), frame(1, 3), frame(1, 4)])
    write(planes, folder / "03746.mha")
    (folder / "03751.mha").write_bytes((folder / "03747.mha").read_bytes())
    run(release)
    record = load(raw_root / "Dataset005_PSFHS")
    assert record["notes"] == {"03746": {"image": "planes differ, mean taken"}}
    image = sitk.ReadImage(str(raw_root / "Dataset005_PSFHS" / "imagesTr" / "03746_0000.nii.gz"))
    mean = np.rint(planes.mean(axis=0))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), mean)
    assert record["duplicates"] == [["03747", "03751"]]
    assert record["groups"]["03751"] == "03747"


def test_refusals(release, raw_root, tmp_path, write):
    folder = release / "PSFHS"
    mask = folder / "label_mha" / "03750.mha"
    data = mask.read_bytes()
    for new, told in (
        (data[:-50], r"label_mha/03750.mha.*cut short"),
        (data[:-1] + b"\3", r"03750: the mask holds 3, expected are 0, 1, 2"),
    ):
        mask.write_bytes(new)
        with pytest.raises(UserError, match=told):
            run(release)
    write(np.zeros((SIDE, SIDE - 1), np.uint8), mask)
    with pytest.raises(UserError, match=r"03750: the mask .* has size 127x128, the image 128x128"):
        run(release)
    mask.unlink()
    with pytest.raises(UserError, match="label_mha lacks the masks of 03750"):
        run(release)
    mask.write_bytes(data)
    image = folder / "image_mha" / "03750.mha"
    image.write_bytes(image.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"image_mha/03750.mha.*cut short"):
        run(release)
    write(np.zeros((3, 40, 40), np.uint8), image)
    with pytest.raises(UserError, match=r"03750.mha is smaller than 64 x 64"):
        run(release)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "004_HC.png").write_text("")
    with pytest.raises(UserError, match=r"no image_mha.* looks like HC18"):
        run(tmp_path / "other")
