"""Lower resolution: areas, outlines, geometry, and what it changes about a conversion."""

import argparse
import json

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_ssl.dataset_conversion import main
from nnunet_ssl.dataset_conversion.resizing import add_resize_option, reduce_image, reduce_mask
from nnunet_ssl.ellipse import head_circumference, mask_ellipse
from nnunet_ssl.errors import UserError

from .conftest import names


def image_of(array, spacing=(1.0, 1.0), origin=(0.0, 0.0)):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    return image


def array_of(image):
    return sitk.GetArrayFromImage(image)


def naive_means(array, size):
    """Means over areas, by a grid so fine that both the old and the new pixels divide it."""
    fine = np.kron(array, np.ones(size))  # each old pixel has size[0] x size[1] parts
    rows, columns = array.shape
    return fine.reshape(size[0], rows, size[1], columns).mean(axis=(1, 3))


@pytest.mark.parametrize("size", [(4, 5), (5, 7), (6, 9), (1, 1), (12, 15)])
def test_image_is_the_mean_over_areas(size):
    array = np.random.default_rng(0).normal(0, 50, (12, 15)).astype(np.float32)
    reduced = array_of(reduce_image(image_of(array), size))
    np.testing.assert_allclose(reduced, naive_means(array, size), rtol=1e-5, atol=1e-4)
    assert reduced.dtype == np.float32
    grey = np.random.default_rng(0).integers(0, 255, (12, 15)).astype(np.uint8)
    reduced = array_of(reduce_image(image_of(grey), size))
    assert reduced.dtype == np.uint8
    assert np.abs(reduced - naive_means(grey, size)).max() <= 0.5


def test_stripes_finer_than_the_new_pixels_leave_no_pattern():
    stripes = np.tile(np.array([0, 200], np.uint8), (40, 20))
    assert np.unique(array_of(reduce_image(image_of(stripes), (10, 10)))).tolist() == [100]


@pytest.mark.parametrize("size", [(4, 5), (5, 7), (6, 9)])
def test_mask_is_the_label_of_the_largest_area(size):
    array = np.kron(np.array([[0, 1, 2], [2, 0, 1]], np.uint8), np.ones((6, 5), np.uint8))
    areas = [naive_means(array == label, size).round(9) for label in (0, 1, 2)]
    np.testing.assert_array_equal(
        array_of(reduce_mask(image_of(array), size)), np.argmax(areas, axis=0)
    )


def test_extent_stays_and_pixels_lie_where_they_lay():
    """A ramp tells for each pixel of both grids where it is."""
    x = np.tile(np.arange(24, dtype=np.float32) * 0.5 + 3, (18, 1))
    image = image_of(x, spacing=(0.5, 0.25), origin=(3, -2))
    reduced = reduce_image(image, (9, 8))
    assert reduced.GetSpacing() == (1.5, 0.5)
    for column in (0, 3, 7):
        place = reduced.TransformIndexToPhysicalPoint((column, 0))
        assert place[0] == pytest.approx(float(array_of(reduced)[0, column]))
    corners = [i.TransformContinuousIndexToPhysicalPoint((-0.5, -0.5)) for i in (image, reduced)]
    assert corners[0] == pytest.approx(corners[1])
    turned = sitk.Image(image)
    turned.SetDirection((0, 1, -1, 0))
    smaller = reduce_mask(turned > 6, (9, 8))
    corners = [i.TransformContinuousIndexToPhysicalPoint((-0.5, -0.5)) for i in (turned, smaller)]
    assert corners[0] == pytest.approx(corners[1])


def test_head_keeps_its_circumference_and_place():
    y, x = np.indices((540, 800))
    head = np.hypot((y - 260) / 150, (x - 410) / 220) <= 1
    image = image_of(head.astype(np.uint8), spacing=(0.1, 0.1))
    for size in ((108, 160), (81, 120), (100, 150)):
        reduced = reduce_mask(image, size)
        spacing = reduced.GetSpacing()[::-1]
        mask = array_of(reduced) == 1
        assert head_circumference(mask, spacing) == pytest.approx(
            head_circumference(head, (0.1, 0.1)), rel=2e-3
        )
        # in mm, from the corner of the image
        middle = (np.array(mask_ellipse(mask).center) + 0.5) * spacing
        assert middle == pytest.approx((26.05, 41.05), abs=0.05)


def test_refusals():
    image = image_of(np.zeros((12, 15), np.uint8))
    for size in ((13, 5), (5, 16)):
        with pytest.raises(UserError, match=r"larger than the image, 12x15 \(rows x columns\)"):
            reduce_image(image, size)
    with pytest.raises(UserError, match="The image is 3D; --resize is for 2D"):
        reduce_image(sitk.Image(4, 4, 4, sitk.sitkUInt8), (2, 2))
    dot = np.zeros((12, 15), np.uint8)
    dot[3, 3] = 2
    with pytest.raises(UserError, match=r"Nothing is left of label 2 at 4x5\. Give a larger"):
        reduce_mask(image_of(dot), (4, 5))
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_resize_option(parser)
    assert parser.parse_args(["--resize", "108x160"]).resize == [108, 160]
    for text in ("108", "0x5", "108,160", "-3x5"):
        with pytest.raises(argparse.ArgumentError):
            parser.parse_args([f"--resize={text}"])


@pytest.fixture
def release(tmp_path, write):
    """One case of HC18."""
    y, x = np.indices((60, 80))
    distance = np.hypot((y - 30) / 20, (x - 40) / 25)
    grey = np.random.default_rng(0).integers(0, 255, (60, 80), np.uint8)
    line = (distance <= 1) & (distance > 0.9)
    write(grey, tmp_path / "HC18" / "training_set" / "004_HC.png")
    write(line * np.uint8(255), tmp_path / "HC18" / "training_set" / "004_HC_Annotation.png")
    (tmp_path / "HC18" / "training_set_pixel_size_and_HC.csv").write_text(
        "filename,pixel size(mm),head circumference (mm)\n004_HC.png,0.1,14\n"
    )
    return tmp_path / "HC18"


def test_hc18_is_filled_first_and_its_name_tells(release, raw_root, write):
    options = ["HC18", "-i", str(release), "-d", "5", "-np", "1"]
    main([*options, "--resize", "30x40"])
    folder = raw_root / "Dataset005_HC18_30x40"
    assert names(raw_root) == [folder.name]
    image, mask = (
        sitk.ReadImage(str(folder / part / f"004_HC{ending}.nii.gz"))
        for part, ending in (("imagesTr", "_0000"), ("labelsTr", ""))
    )
    y, x = np.indices((60, 80))
    filled = (np.hypot((y - 30) / 20, (x - 40) / 25) <= 1).astype(np.uint8)
    np.testing.assert_array_equal(array_of(mask), naive_means(filled, (30, 40)) > 0.5)
    np.testing.assert_allclose(image.GetSpacing(), (0.2, 0.2), rtol=1e-6)
    assert mask.GetSpacing() == image.GetSpacing()
    assert mask.GetOrigin() == image.GetOrigin()
    record = json.loads((folder / "conversion.json").read_text(encoding="utf-8"))
    assert record["options"]["resize"] == [30, 40]
    main([*options, "--resize", "30x40"])  # the same again: nothing to do
    with pytest.raises(UserError, match="Id 5 is taken"):
        main(options)


def test_size_of_the_original_is_checked(release, raw_root, write):
    """A mask on another grid is told, although both would have one size afterwards."""
    path = release / "training_set" / "004_HC_Annotation.png"
    line = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    write(line[:-1], path)
    with pytest.raises(UserError, match=r"004_HC: the mask .* has size 80x59, the image 80x60"):
        main(["HC18", "-i", str(release), "-d", "5", "-np", "1", "--resize", "30x40"])
