"""Which classes are one piece, against scipy."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import ndimage

from nnunet_ssl.data.components import single_piece


def dataset(*masks):
    cases = {f"case_{i:02d}": np.asarray(m, np.int8)[None] for i, m in enumerate(masks)}
    return SimpleNamespace(
        identifiers=list(cases), load_case=lambda name: (None, cases[name], None, {})
    )


def naive(masks, label_sets, slices, share):
    chosen = []
    for k, labels in enumerate(label_sets):
        parts = [np.isin(m, labels) for m in masks]
        parts = [z for p in parts for z in p] if slices else parts
        counts = [ndimage.label(p, np.ones((3,) * p.ndim))[1] for p in parts if p.any()]
        if counts and np.mean([c == 1 for c in counts]) >= share:
            chosen.append(k)
    return chosen


@pytest.mark.parametrize("slices", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_equals_scipy_on_random_masks(slices, share):
    rng = np.random.default_rng(0)
    label_sets = [(1,), (2,), (3,), (1, 2), (1, 2, 3), (9,)]
    results = set()
    for density in (0.02, 0.1, 0.3):
        masks = []
        for _ in range(8):
            mask = rng.choice(4, (4, 5, 6), p=[1 - 3 * density] + [density] * 3)
            mask[rng.random(mask.shape) < 0.1] = -1  # padding is no class
            masks.append(mask)
        found = single_piece(dataset(*masks), label_sets, slices, share)
        assert found == naive(masks, label_sets, slices, share)
        results.add(tuple(found))
    assert len(results) > 1


def test_touching_corners_are_one_piece_in_3d_and_pieces_of_slices_count_by_themselves():
    corners = np.zeros((4, 6, 6), int)
    corners[0, 0, 0] = corners[1, 1, 1] = 1  # joined by a corner
    horseshoe = np.zeros((4, 6, 6), int)
    horseshoe[:, :, 1] = horseshoe[:, :, 4] = 2
    horseshoe[0, 0, 1:5] = 2  # one piece, two in three of four slices
    data = dataset(corners + horseshoe)
    assert single_piece(data, [(1,), (2,)], slices=False, share=0.95) == [0, 1]
    assert single_piece(data, [(1,), (2,)], slices=True, share=0.95) == [0]


def test_share_counts_only_cases_with_the_class():
    whole, absent = np.zeros((3, 4, 4), int), np.zeros((3, 4, 4), int)
    whole[1, 1:3, 1:3] = 1
    split = np.zeros_like(whole)
    split[0, 0, 0] = split[2, 3, 3] = 1
    assert single_piece(dataset(*[whole] * 19, split, *[absent] * 50), [(1,)], False, 0.95) == [0]
    assert single_piece(dataset(*[whole] * 18, split, *[absent] * 50), [(1,)], False, 0.95) == []
    assert single_piece(dataset(absent), [(1,)], False, 0.95) == []
    cases = dataset(*[whole] * 20, *[absent] * 5)
    assert single_piece(cases, [(1,)], False, 0.95, least=20) == [0]
    assert single_piece(cases, [(1,)], False, 0.95, least=21) == []
    assert single_piece(cases, [(1,)], True, 0.95, least=21) == []  # in one slice of each


def test_region_of_two_labels_is_one_piece_where_its_parts_are_not():
    mask = np.zeros((1, 3, 5), int)
    mask[0, 1, :] = [1, 2, 1, 2, 1]
    assert single_piece(dataset(mask), [(1,), (2,), (1, 2)], True, 0.95) == [2]
