import pytest
import torch
from torch.nn.functional import normalize

from nnunet_ssl.modules import ClassBank


def test_holds_the_latest_found_vectors_of_each_group_as_a_naive_queue():
    torch.manual_seed(0)
    bank = ClassBank(3, 8, 4)
    queues = [[], [], []]
    for _ in range(7):
        vectors, found = 5 * torch.randn(3, 5, 4), torch.rand(3, 5) > 0.4
        found[2] = False
        bank.update(vectors, found)
        for k in range(3):
            queues[k] = (queues[k] + list(vectors[k][found[k]]))[-8:]
        for k in range(3):
            held = {tuple(v.tolist()) for v in bank.vectors[k] if v.any()}
            expected = (
                {tuple(v.tolist()) for v in normalize(torch.stack(queues[k]), dim=1)}
                if queues[k]
                else set()
            )
            assert {tuple(round(x, 5) for x in v) for v in held} == {
                tuple(round(x, 5) for x in v) for v in expected
            }
    assert bank.seen().tolist() == [True, True, False]
    for k in range(2):
        mean = normalize(torch.stack(queues[k]), dim=1).mean(0)
        assert torch.allclose(bank.prototypes()[k], normalize(mean, dim=0), atol=1e-5)
    assert (bank.prototypes()[2] == 0).all()


def test_vectors_that_are_not_finite_are_left_out():
    torch.manual_seed(0)
    bank, other = ClassBank(2, 4, 3), ClassBank(2, 4, 3)
    vectors, found = torch.randn(2, 3, 3), torch.ones(2, 3).bool()
    vectors[0, 1, 2], vectors[1, 0, 0] = torch.nan, torch.inf
    bank.update(vectors, found)
    found[0, 1] = found[1, 0] = False
    other.update(vectors.nan_to_num(posinf=1), found)
    for name, value in other.state_dict().items():
        assert torch.equal(bank.state_dict()[name], value), name


def test_state_goes_through_a_checkpoint():
    bank, other = ClassBank(2, 4, 3), ClassBank(2, 4, 3)
    bank.update(torch.randn(2, 3, 3), torch.ones(2, 3).bool())
    other.load_state_dict(bank.state_dict())
    for b in (bank, other):
        b.update(torch.ones(2, 2, 3), torch.ones(2, 2).bool())
    assert torch.equal(bank.vectors, other.vectors) and torch.equal(bank.count, other.count)


def test_more_vectors_than_places_are_refused():
    with pytest.raises(ValueError, match="5"):
        ClassBank(1, 4, 2).update(torch.randn(1, 5, 2), torch.ones(1, 5).bool())
