"""Losses of a short toy run, as they were when each trainer was last looked at.

A change here means that a method changed. After a wanted change, write them anew:
`python -m pytest tests/trainers/test_golden.py --rewrite-golden`.
"""

import json
from pathlib import Path

import pytest

from nnunet_ssl.history import read_log
from nnunet_ssl.naming import trainer_classes

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.mark.parametrize("name", sorted(trainer_classes()))
def test_losses_are_the_known_ones(name, make_trainer, request):
    trainer = make_trainer(name)
    trainer.run_training()
    records = read_log(Path(trainer.output_folder) / "ssl_log.jsonl")
    losses = [{k: round(v, 5) for k, v in r["terms"].items()} for r in records]
    path = GOLDEN / f"{name}.json"
    if request.config.getoption("--rewrite-golden"):
        path.write_text(json.dumps(losses, indent=1) + "\n")
    known = json.loads(path.read_text(encoding="utf-8"))
    assert [e.keys() for e in losses] == [e.keys() for e in known]
    for epoch, expected in zip(losses, known, strict=True):
        assert epoch == pytest.approx(expected, rel=2e-3, abs=2e-3)
