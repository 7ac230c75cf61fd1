"""Agreement of segmentations, and which cases are chosen by it."""

import json

import numpy as np
import pytest

from nnunet_ssl.data.pseudo_labels import balanced
from nnunet_ssl.offline.select import choose, collapse_of
from nnunet_ssl.offline.stability import Committee, agreement, change, stability

SETS = {"whole": [1, 2], "core": [2], "other": [3]}


def test_agreement_equals_a_naive_loop():
    rng = np.random.default_rng(0)
    labels, *others = rng.integers(0, 3, (4, 5, 6, 7))
    found = agreement(labels, others, SETS)
    assert found["other"] is None  # none of them shows it
    for name in ("whole", "core"):
        scores = []
        for other in others:
            both = own = theirs = 0
            for a, b in zip(labels.ravel(), other.ravel(), strict=True):
                both += a in SETS[name] and b in SETS[name]
                own += a in SETS[name]
                theirs += b in SETS[name]
            scores.append(2 * both / (own + theirs))
        assert found[name] == pytest.approx(np.mean(scores), abs=1e-12)
    assert stability(found) == pytest.approx((found["whole"] + found["core"]) / 2)
    assert agreement(labels.astype(np.float32), [o.astype(np.uint8) for o in others], SETS) == found
    committee = Committee(labels, SETS)
    for other in others:
        committee.add(other)
    assert (committee.unsure == np.any([labels != o for o in others], axis=0)).all()


def test_a_class_that_only_one_shows_has_no_agreement():
    labels, other = np.zeros((2, 4, 4), int)
    assert agreement(labels, [other], SETS) == dict.fromkeys(SETS)
    assert stability(dict.fromkeys(SETS)) == 1  # all say: nothing there
    other[0, 0] = 3
    assert agreement(labels, [other], SETS)["other"] == 0
    # against an empty one it does not count: 1 with itself, nothing with the other
    assert agreement(labels, [other, labels], SETS)["other"] == 0
    assert change(other, labels) == (1, 1) and change(labels, other) == (1, 0)


def row(case, value, voxels=5, **more):
    sure = {"unsure": 0.5, "implausible": None}
    return {"case": case, "stability": value, "voxels": {"a": voxels}} | sure | more


def test_who_is_chosen():
    rows = [row(f"c{k}", k / 10) for k in range(10)]
    rows[9] = row("c9", 0.9, voxels=0)
    rows[8]["implausible"] = "a is no ellipse"
    rows[7]["unsure"] = 0.51
    rows.append({"case": "bad", "error": "cut short"})
    reasons = choose(rows, ["a"], 0.2)
    assert [c for c, why in reasons.items() if why is None] == [f"c{k}" for k in range(2, 7)]
    assert reasons["c0"] == reasons["c1"] == "among the least stable 20 %"
    assert reasons["c9"] == "no a, which every annotated case has"
    assert reasons["c7"] == "more of it is unsure than sure: 51 %"
    assert reasons["c8"] == "a is no ellipse" and reasons["bad"] == "cannot be read: cut short"
    assert choose(rows, [], 0.2)["c9"] is None  # some annotated cases lack it, too


def test_one_case_stays_for_the_online_teacher():
    reasons = choose([row("a", 0.9), row("b", 0.8)], ["a"], 0.0)
    assert reasons["a"] is None and "one case stays" in reasons["b"]
    assert list(choose([row("only", 1.0)], ["a"], 0.2).values()) != [None]


def test_true_masks_are_half_of_what_is_drawn():
    made = {f"m{k}" for k in range(9)}
    drawn = balanced(["t1", "t2", *sorted(made)], made)
    assert [drawn.count(c) for c in ("t1", "t2", "m0")] == [4, 4, 1]
    assert balanced(["t1", "t2"], made) == ["t1", "t2"]
    assert balanced(["t1", "t2", "t3", "m0"], made) == ["m0", "t1", "t2", "t3"]
    assert balanced(["m0", "m1"], made) == ["m0", "m1"]


def log(folder, *records):
    lines = [json.dumps({"terms": {"sup": 0.1}, "pseudo_labels": {}, **r}) for r in records]
    (folder / "ssl_log.jsonl").write_text("\n".join(lines) + "\n")
    return collapse_of(folder, ["liver", "tumour"], true_volumes=True)


def test_which_models_must_not_teach(tmp_path):
    good = {"pseudo_dice": {"student": [0.9, 0.0], "teacher": [0.9, 0.4]}}
    lost = {"pseudo_dice": {"student": [0.9, 0.0], "teacher": [0.9, None]}}
    braked = good | {"pseudo_labels": {"brake": 0.4}}
    assert collapse_of(tmp_path, ["liver", "tumour"], True) is None  # no log of ours
    assert log(tmp_path, lost, good) is None
    assert "does not find tumour" in log(tmp_path, good, *[lost] * 5)
    assert "brake stood at 0.40" in log(tmp_path, good, braked)
    assert log(tmp_path, braked, good) is None  # the brake opened again
    assert "not a finite number" in log(tmp_path, good | {"terms": {"sup": None}})
    log(tmp_path, braked)  # volumes of made masks do not tell the truth
    assert collapse_of(tmp_path, ["liver", "tumour"], true_volumes=False) is None


@pytest.mark.parametrize(("cases", "drop", "dropped"), [(4, 0.2, 0), (9, 0.2, 1), (100, 0.29, 29)])
def test_the_least_stable_share_is_rounded_down(cases, drop, dropped):
    rows = [row(f"c{k:03d}", k / cases) for k in range(cases)]
    reasons = choose(rows, [], drop)
    assert sum("among" in (why or "") for why in reasons.values()) == dropped


def test_a_scan_that_cannot_be_read_is_not_the_one_that_stays():
    rows = [row("a", 0.9), row("b", 0.8), {"case": "bad", "error": "cut short"}]
    reasons = choose(rows, [], 0.0)
    assert reasons["a"] is None and "one case stays" in reasons["b"]
