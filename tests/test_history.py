"""The log of a run and its curves."""

import errno
import io
import json
import math

import numpy as np
import pytest
import torch

from nnunet_ssl.errors import UserError
from nnunet_ssl.history import History, Meter, read_log

NAN, INF = float("nan"), float("inf")


def test_meter_means_equal_numpy_and_leave_missing_values_out():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(20, 3))
    values[rng.random(values.shape) < 0.3] = NAN
    values[3, 0], values[4, 1] = INF, -INF
    meter = Meter()
    for row in values:
        meter.add("vector", torch.tensor(row))
        meter.add("scalar", torch.tensor(row[0]))
        meter.add("float", float(row[1]))
    counted = np.where(np.isfinite(values), values, NAN)
    means = meter.means()
    assert means["vector"] == pytest.approx(np.nanmean(counted, 0).tolist(), rel=1e-5)
    assert means["scalar"] == pytest.approx(np.nanmean(counted[:, 0]), rel=1e-5)
    assert means["float"] == pytest.approx(np.nanmean(counted[:, 1]), rel=1e-5)


def test_meter_starts_anew_and_tells_nan_where_nothing_counted():
    meter = Meter()
    meter.add("a", torch.tensor([NAN, 1.0]))
    meter.add("a", torch.tensor([INF, 3.0]))
    meter.add("b", NAN)
    means = meter.means()
    assert math.isnan(means["a"][0]) and means["a"][1] == 2
    assert math.isnan(means["b"])
    assert meter.means() == {}
    meter.add("a", 5)  # a vector before, a scalar now
    assert meter.means() == {"a": 5.0}


def test_meter_keeps_no_graph_and_counts_half_precision():
    meter = Meter()
    weight = torch.ones(2, requires_grad=True)
    for _ in range(100):
        meter.add("loss", (weight * 1000).to(torch.float16))
    assert not meter._sums["loss"].requires_grad
    assert meter.means() == {"loss": [1000.0, 1000.0]}  # the sum is above float16's range


def test_adding_waits_for_no_device():
    """A tensor without values cannot be waited for: reading it raises."""
    meter = Meter()
    for shape in ((), (3,)):
        for _ in range(3):
            meter.add(str(shape), torch.ones(shape, device="meta"))
    assert meter._sums["(3,)"].device.type == "meta"
    with pytest.raises((NotImplementedError, RuntimeError)):
        meter.means()


def record(epoch, **changes):
    return {
        "epoch": epoch,
        "terms": {"sup": 1.0 / (epoch + 1), "unsup": NAN},
        "pseudo_labels": {"coverage": 0.5},
        "shares": {"pseudo": [0.1, NAN], "labels": [0.1, 0.2]},
        "pseudo_dice": {"student": [0.5, None], "teacher": [NAN, 0.7]},
        **changes,
    }


def refuse(token):
    raise AssertionError(f"{token} is no JSON")


def test_log_is_json_without_nan(tmp_path):
    history = History(tmp_path)
    history.append(record(0, seconds=INF, lr=-INF, nested={"a": [[NAN, 1.0]]}))
    history.append(record(1))
    lines = history.path.read_text(encoding="utf-8").splitlines()
    first, second = (json.loads(line, parse_constant=refuse) for line in lines)
    assert first["terms"] == {"sup": 1.0, "unsup": None}
    assert first["shares"]["pseudo"] == [0.1, None]
    assert first["seconds"] is None and first["lr"] is None
    assert first["nested"] == {"a": [[None, 1.0]]}
    assert [first, second] == read_log(history.path) == history.records


@pytest.mark.parametrize("torn", ["", "{", '{"epoch": 3, "terms": {"su', "\n\n", "\0\0\0\n"])
def test_cut_back_drops_later_epochs_and_torn_lines(torn, tmp_path):
    history = History(tmp_path)
    for epoch in range(4):
        history.append(record(epoch))
    with open(history.path, "a") as f:
        f.write(torn)
    continued = History(tmp_path)
    continued.cut_back(2)
    assert [r["epoch"] for r in continued.records] == [0, 1]
    continued.append(record(2))
    assert [r["epoch"] for r in read_log(continued.path)] == [0, 1, 2]
    assert len(continued.path.read_text(encoding="utf-8").splitlines()) == 3


def test_cut_back_without_a_log_starts_an_empty_one(tmp_path):
    history = History(tmp_path)
    history.cut_back(5)
    assert history.records == [] and history.path.read_text(encoding="utf-8") == ""


class Full(io.TextIOWrapper):
    """A text file on a full disk."""

    def __init__(self, path, mode, encoding):
        super().__init__(open(path, mode + "b"), encoding=encoding)  # noqa: SIM115

    def write(self, text):
        super().write(text[: len(text) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_names_the_log_and_a_later_run_mends_it(tmp_path, monkeypatch):
    history = History(tmp_path)
    history.append(record(0))
    monkeypatch.setattr("nnunet_ssl.history.open", Full, raising=False)
    with pytest.raises(UserError, match=r"ssl_log\.jsonl: the disk is full\. Free some space"):
        history.append(record(1))
    monkeypatch.undo()
    assert not history.path.read_text(encoding="utf-8").endswith("\n")  # torn
    continued = History(tmp_path)
    continued.cut_back(1)
    continued.append(record(1))
    assert [r["epoch"] for r in read_log(history.path)] == [0, 1]


@pytest.mark.parametrize(
    "records",
    [
        [],
        [record(0)],
        [record(e) for e in range(3)],
        [{"epoch": 0}, record(1)],
        [record(0, shares={}, terms={}, pseudo_labels={}, pseudo_dice={})],
        [record(0, shares={"pseudo": None, "labels": [0.1, 0.2]}), record(1, shares={})],
        [record(0, pseudo_dice={"student": None})],
    ],
)
def test_plot_draws_what_is_there(records, tmp_path):
    import matplotlib.pyplot as plt

    history = History(tmp_path)
    for r in records:
        history.append(r)
    open_before = plt.get_fignums()
    history.plot()
    assert history.plot_path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert plt.get_fignums() == open_before
    assert not list(tmp_path.glob("*.part"))


def test_curves_hold_the_numbers_of_the_log(tmp_path):
    history = History(tmp_path)
    for epoch in range(2):
        history.append(record(epoch))
    history.append(record(2, terms={"sup": 0.1, "late": 0.2}))
    terms = {name: values for name, values, _ in history._curves("terms")}
    assert terms["sup"] == [1.0, 0.5, 0.1]
    assert terms["late"][2] == 0.2 and all(map(math.isnan, terms["late"][:2]))
    dice = {name: values for name, values, _ in history._curves("pseudo_dice")}
    assert dice == {"student": [0.5] * 3, "teacher": [0.7] * 3}  # classes without a value are out
    shares = {(name, style): values for name, values, style in history._curves("shares")}
    assert shares["pseudo, class 1", "-"] == [0.1] * 3
    assert all(map(math.isnan, shares["pseudo, class 2", "-"]))
    assert shares["labels, class 2", "--"] == [0.2] * 3


def test_failed_plot_leaves_the_old_picture(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    history = History(tmp_path)
    history.append(record(0))
    history.plot()
    old = history.plot_path.read_bytes()

    def full(self, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(UserError, match=r"ssl_progress\.png: the disk is full"):
        history.plot()
    assert history.plot_path.read_bytes() == old
    assert not list(tmp_path.glob("*.part"))
    assert plt.get_fignums() == []
