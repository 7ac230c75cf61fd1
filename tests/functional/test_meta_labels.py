import numpy as np
import pytest
import torch

from nnunet_ssl.functional import meta_labels, partition, retrieval, slice_features, slice_positions


@pytest.mark.parametrize("parts", [2, 3, 8])
@pytest.mark.parametrize("slices", [1, 2, 3, 7, 8, 10, 40, 41])
def test_parts_are_even_ordered_and_all_used(slices, parts):
    middle = (torch.arange(slices) + 0.5) / slices
    labels = partition(middle, parts)
    assert (labels.diff() >= 0).all() and labels.dtype == torch.int64
    sizes = torch.bincount(labels, minlength=parts)
    assert len(sizes) == parts and sizes.max() - sizes.min() <= 1
    turned = partition(1 - middle, parts)
    tied = (middle * parts).frac().minimum(1 - (middle * parts).frac()) < 1e-5  # on a border
    assert torch.equal(turned[~tied], parts - 1 - labels[~tied])


def test_positions_at_and_beyond_the_ends():
    assert partition(torch.tensor([-0.1, 0.0, 1.0, 1.2]), 3).tolist() == [0, 0, 2, 2]


def test_slice_features_are_means_in_the_plane():
    flat = torch.randn(2, 5, 4, 3)
    torch.testing.assert_close(slice_features(flat), flat.mean((2, 3)))
    deep = torch.randn(2, 5, 6, 4, 3).half()
    found = slice_features(deep)
    assert found.shape == (12, 5) and found.dtype == torch.float32
    torch.testing.assert_close(found[6 + 2], deep[1, :, 2].float().mean((1, 2)))


def test_slice_positions_are_means_over_what_lies_in_the_scan():
    torch.manual_seed(0)
    z_map, valid = torch.rand(2, 1, 8, 4, 5), torch.rand(2, 1, 8, 4, 5) < 0.7
    valid[1, 0, 6:] = False
    valid[1, 0, 2:4] = False
    valid[1, 0, 2, 0, 0] = True  # 1 of 40 voxels is less than 5 %
    position, counted = slice_positions(z_map, valid, 4)
    assert counted.tolist() == [True] * 5 + [False, True, False]
    for i in range(8):
        b, s = divmod(i, 4)
        part = slice(2 * s, 2 * s + 2)
        if counted[i]:
            expected = z_map[b, 0, part][valid[b, 0, part]].mean()
            torch.testing.assert_close(position[i], expected)
    assert position.isfinite().all()


def naive_retrieval(feature, labels, group):
    hits, chances = [], []
    for i in range(len(feature)):
        others = [j for j in range(len(feature)) if group[j] != group[i] and labels[j] >= 0]
        same = [j for j in others if labels[j] == labels[i]]
        if same:
            cosine = [
                feature[i] @ feature[j] / np.linalg.norm(feature[i]) / np.linalg.norm(feature[j])
                for j in others
            ]
            hits.append(labels[others[int(np.argmax(cosine))]] == labels[i])
            chances.append(len(same) / len(others))
    return np.mean(hits), np.mean(chances)


@pytest.mark.parametrize("rows", [7, 1024])
def test_retrieval_is_that_of_the_loops(rows, monkeypatch):
    monkeypatch.setattr(meta_labels, "ROWS", rows)
    rng = np.random.default_rng(0)
    labels, group = rng.integers(-1, 4, 40), rng.integers(0, 6, 40)
    feature = rng.normal(size=(40, 3)) + 0.8 * np.eye(5)[labels][:, :3]
    found = retrieval(*map(torch.from_numpy, (feature, labels, group)))
    assert [v.item() for v in found] == pytest.approx(naive_retrieval(feature, labels, group))


def test_retrieval_of_clear_and_of_useless_features():
    labels, group = torch.arange(4).repeat(10), torch.arange(10).repeat_interleave(4)
    hits, chance = retrieval(torch.eye(4)[labels], labels, group)
    assert hits == 1 and chance == pytest.approx(0.25)
    hits, _ = retrieval(torch.eye(10)[group], labels, group)
    assert hits < 0.5
    assert torch.stack(retrieval(torch.randn(4, 2), torch.arange(4), torch.arange(4))).isnan().all()
