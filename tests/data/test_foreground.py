"""Patches around foreground that the teacher saw in scans without masks."""

import multiprocessing

import numpy as np
import pytest
import torch

from nnunet_ssl.data import foreground
from nnunet_ssl.data.foreground import (
    ForegroundPlaces,
    places_of,
    read_places,
    search,
    segment,
    tiles,
    write_places,
)
from nnunet_ssl.data.loader import PatchLoader
from nnunet_ssl.data.views import Pipeline

from .cases import PLAIN, SHAPE, still, unlabeled_cases


@pytest.fixture(autouse=True)
def seeded():
    np.random.seed(0)


def rows(voxels):
    return {tuple(v) for v in voxels.tolist()}


def found_in(folder, places):
    """What tells loaders of these places, after a first search."""
    told = ForegroundPlaces(folder)
    write_places(places, told.path(1))
    told.number = 1
    return told


def loader(cases, places, share=0.5, patch=(4, 4, 4), size=8):
    pipeline = Pipeline(still(patch), labeled=False)
    return PatchLoader(
        cases, size, patch, patch, PLAIN, pipeline, share, meta=("case", "position"), places=places
    )


@pytest.mark.parametrize("regions", [False, True])
def test_voxels_of_each_class(regions):
    labels = torch.zeros(2 if regions else 1, 3, 4, 5, dtype=torch.bool if regions else torch.long)
    first, second = {(0, 1, 2, 3), (0, 0, 0, 0)}, {(0, 2, 3, 4)}
    for k, voxels in ((1, first), (2, second)):
        for _, z, y, x in voxels:
            labels[(k - 1 if regions else 0, z, y, x)] = True if regions else k
    found = places_of(labels, 2 if regions else 3, regions, np.random.default_rng(0))
    assert {k: rows(v) for k, v in found.items()} == {1: first, 2: second}
    assert places_of(labels * 0, 2 if regions else 3, regions, np.random.default_rng(0)) == {}


def test_at_most_so_many_voxels_from_everywhere(monkeypatch):
    monkeypatch.setattr(foreground, "MOST_VOXELS", 100)
    found = places_of(
        torch.ones(1, 10, 10, 10, dtype=torch.long), 2, False, np.random.default_rng(0)
    )
    assert len(rows(found[1])) == 100  # none twice
    assert all(set(found[1][:, axis]) == set(range(10)) for axis in (1, 2, 3))


def test_files_keep_the_places(tmp_path):
    places = {
        "b": {1: np.array([[0, 1, 2, 3], [0, 4, 5, 6]], np.int32), 3: np.array([[0, 7, 8, 9]])},
        "a": {2: np.array([[0, 300, 0, 70000]])},
    }
    write_places(places, tmp_path / "x.npz")
    again = read_places(tmp_path / "x.npz")
    assert {c: {k: rows(v) for k, v in found.items()} for c, found in again.items()} == {
        c: {k: rows(v) for k, v in found.items()} for c, found in places.items()
    }
    write_places({}, tmp_path / "x.npz")
    assert read_places(tmp_path / "x.npz") == {}


def number_and_cases(places, told, queue):
    queue.put(sorted(places.now()))
    told.wait()
    queue.put(sorted(places.now()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_sees_a_later_search(method, tmp_path):
    context = multiprocessing.get_context(method)
    places = ForegroundPlaces(tmp_path)
    told, queue = context.Event(), context.Queue()
    child = context.Process(target=number_and_cases, args=(places, told, queue))
    child.start()
    assert queue.get(timeout=60) == []
    write_places({"a": {1: np.array([[0, 1, 2, 3]])}}, places.path(1))
    places.number = 1
    told.set()
    assert queue.get(timeout=60) == ["a"]
    child.join()


def test_patches_are_drawn_around_places_and_elsewhere(tmp_path):
    """Case 1 and 2 are known; the channels of a patch tell where it is from."""
    cases = unlabeled_cases(tmp_path / "cases", number=4)
    known = {"un_001": {1: [[0, 5, 6, 7]], 2: [[0, 2, 2, 13]]}, "un_002": {2: [[0, 9, 9, 3]]}}
    known = {c: {k: np.array(v) for k, v in found.items()} for c, found in known.items()}
    made = loader(cases, found_in(tmp_path, known))
    forced, seen = 0, set()
    for _ in range(60):
        batch = next(made)
        for j, key in enumerate(batch["keys"]):
            if not batch["forced_fg"][j]:
                continue
            forced += 1
            low = batch["data"][j, :3].flatten(1).min(1).values.long() - 1  # of z, y, x
            hits = {
                (str(key), k)
                for k, voxels in known[key].items()
                if all(low[i] <= voxels[0][i + 1] < low[i] + 4 for i in range(3))
            }
            assert hits
            seen |= hits
            assert batch["meta"]["case"][j] == cases.identifiers.index(key)
    assert 180 <= forced <= 300  # of 480, each with probability 0.5
    assert seen == {("un_001", 1), ("un_001", 2), ("un_002", 2)}


def test_nothing_changes_before_a_search_or_if_nothing_was_seen(tmp_path):
    cases = unlabeled_cases(tmp_path / "cases")
    without, waiting, empty = None, ForegroundPlaces(tmp_path), found_in(tmp_path, {})
    drawn = []
    for places in (without, waiting, empty):
        np.random.seed(1)
        made = loader(cases, places, share=0.0 if places is None else 0.9)
        batches = [next(made) for _ in range(3)]
        assert not any(b["forced_fg"].any() for b in batches)
        drawn.append(torch.cat([b["data"] for b in batches]))
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_second_view_is_of_the_same_case(tmp_path):
    """A search that ends between the two draws of a batch does not come between them."""
    cases = unlabeled_cases(tmp_path / "cases")
    places = found_in(tmp_path, {"un_001": {1: np.array([[0, 5, 6, 7]])}})
    write_places({"un_002": {1: np.array([[0, 5, 6, 7]])}}, places.path(2))
    pipeline = Pipeline(still((4, 4, 4)), labeled=False, views=("second",))
    made = PatchLoader(cases, 6, (4, 4, 4), (4, 4, 4), PLAIN, pipeline, 0.9, places=places)
    draw = made._draw

    def search_ends_meanwhile():
        batch = draw()
        places.number = 2
        return batch

    made._draw = search_ends_meanwhile
    batch = next(made)
    assert batch["forced_fg"].any()
    case = batch["data"][:, 3].flatten(1).max(1).values
    assert torch.equal(batch["views"]["second"][:, 3].flatten(1).max(1).values, case)


@pytest.mark.parametrize(
    ("shape", "patch"),
    [
        ((12, 14, 16), (12, 14, 16)),
        ((12, 14, 16), (6, 8, 5)),
        ((3, 14, 4), (8, 8, 8)),
        ((5, 14, 16), (8, 16)),
        ((2, 3, 30), (8, 16)),
    ],
)
@pytest.mark.parametrize("regions", [False, True])
def test_a_case_is_segmented_patch_by_patch(shape, patch, regions):
    data = torch.randint(0, 5, (2, *shape)).float()
    passes = []

    def decide(x):
        assert x.shape == (3, 2, *patch)
        passes.append(x)
        return x > 2 if regions else x[:, :1].long()

    labels = segment(data, decide, patch, 3)
    assert torch.equal(labels, data > 2 if regions else data[:1].to(torch.int16))
    assert len(passes) == -(-tiles(shape, patch) // 3)


def test_tiles():
    assert tiles((10, 40, 33), (20, 20, 16)) == 1 * 2 * 3
    assert tiles((10, 40, 33), (20, 16)) == 10 * 2 * 3
    assert tiles((1, 12, 12), (12, 12)) == 1


def test_search_goes_through_random_cases_until_its_budget_is_used_up(tmp_path, monkeypatch):
    cases = unlabeled_cases(tmp_path, number=6, hole=True)
    asked = []

    def decide(x):
        case = int(x[0, 3].max()) - 1
        if case not in asked:
            asked.append(case)
        return torch.ones_like(x[:, :1]).long() * (case != 2)  # nothing in case 2

    def run(passes, process=(0, 1), seed=0):
        asked.clear()
        rng = np.random.default_rng(seed)
        return search(cases, decide, (6, 14, 16), 2, passes, 2, False, rng, process)

    everything = run(100)
    assert sorted(asked) == list(range(6)) and asked != sorted(asked)
    order = list(asked)
    assert everything["un_002"] == {} and len(everything["un_001"][1]) > 0
    # outside of what nnU-Net left of the image nothing is seen
    assert min(v[:, 2].min() for c, f in everything.items() for v in f.values()) == SHAPE[1] // 2
    for passes, number in ((0, 1), (2, 1), (3, 1), (4, 2), (11, 5), (12, 6)):
        run(passes)
        assert asked == order[:number], passes
    halves = [run(100, process=(i, 2)) for i in (0, 1)]
    assert [set(h) for h in halves] == [{f"un_{i:03d}" for i in order[j::2]} for j in (0, 1)]
    run(100, seed=1)
    assert asked != order
    monkeypatch.setattr(foreground, "MOST_CASES", 2)
    run(100)
    assert asked == order[:2]
