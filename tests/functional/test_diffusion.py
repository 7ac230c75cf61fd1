import pytest
import torch

from nnunet_ssl.functional import alpha_bars, clean_state, ddim, ddim_steps, q_sample


def test_schedule_is_the_product_of_single_steps_and_ends_in_noise():
    ab = alpha_bars()
    assert ab.shape == (1000,) and (ab.diff() < 0).all() and ab[-1] < 1e-4
    product, known = 1.0, {0: 0.9999, 99: 0.897, 499: 0.0786, 999: 4.0e-5}
    for t in range(1000):
        product *= 1 - (1e-4 + (2e-2 - 1e-4) * t / 999)
        assert ab[t].item() == pytest.approx(product, rel=1e-5)
        assert ab[t].item() == pytest.approx(known.get(t, product), rel=1e-2)


@pytest.mark.parametrize("t", [0, 99, 499, 999])
def test_forward_marginal_has_the_mean_and_variance_of_the_chain(t):
    torch.manual_seed(0)
    ab, draws = alpha_bars(), 40000
    clean = torch.tensor([1.0, -1.0]).view(1, 2, 1).expand(draws, 2, 1)
    state = q_sample(clean, torch.randn(clean.shape), ab[t].expand(draws))
    mean, variance = state.mean(0).flatten(), state.var(0).flatten()
    assert torch.allclose(mean, ab[t].sqrt() * torch.tensor([1.0, -1.0]), atol=0.02)
    assert torch.allclose(variance, 1 - ab[t], rtol=0.03)
    # one step after the other: v <- (1 - beta) v + beta
    chain = 0.0
    for s in range(t + 1):
        beta = 1 - ab[s].double() / (ab[s - 1].double() if s else 1)
        chain = (1 - beta) * chain + beta
    assert float(chain) == pytest.approx(1 - ab[t].item(), rel=1e-3)


def test_each_sample_has_its_own_time():
    clean, noise = torch.ones(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    found = q_sample(clean, noise, torch.tensor([1.0, 0.25]))
    assert torch.equal(found[0], clean[0])
    assert torch.allclose(found[1], 0.5 + 0.75**0.5 * noise[1])


@pytest.mark.parametrize("shape", [(6, 7), (3, 4, 5)])
def test_clean_state_of_classes_and_regions(shape):
    label = torch.randint(0, 4, (2, 1, *shape))  # 3 is the ignore label
    known = label != 3
    state = clean_state(label, 3, False, known)
    for k in range(3):
        assert (state[:, k][label[:, 0] == k] == 1).all()
        assert (state[:, k][(label[:, 0] != k) & known[:, 0]] == -1).all()
    assert (state * ~known == 0).all()
    assert state.abs().max() == 1
    masks = torch.rand(2, 2, *shape) > 0.5
    assert torch.equal(clean_state(masks, 5, True), masks.float() * 2 - 1)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_sampler_with_an_oracle_returns_the_oracle(steps, regions):
    torch.manual_seed(0)
    truth = torch.randint(0, 3, (2, 1, 8, 8))
    if regions:
        truth = torch.cat([truth > 0, truth > 1], 1)
    clean = clean_state(truth, 3, regions)
    noise, ab, seen = torch.randn(clean.shape), alpha_bars(), []

    def oracle(state, time):
        seen.append(time)
        # a perfect x_0 keeps the noise of the start: the state is on the straight path
        expected = q_sample(
            clean, (noise - ab[999].sqrt() * clean) / (1 - ab[999]).sqrt(), ab[time]
        )
        assert torch.allclose(state, expected, atol=1e-3)
        return 100 * clean

    prob = ddim(oracle, noise, ab, steps, regions)
    assert torch.allclose(2 * prob - 1, clean, atol=1e-6)
    times = [t[0].item() for t in seen]
    evenly = {1: [999], 3: [999, 500, 0], 10: list(range(999, -1, -111))}
    assert times == evenly[steps] and all(len(t) == 2 for t in seen)


def test_sampler_equals_a_naive_loop_and_gives_probabilities():
    torch.manual_seed(0)
    weight = torch.randn(3, 3) * 0.5
    noise, ab = torch.randn(2, 3, 5, 5), alpha_bars()

    def denoise(state, time):
        mixed = torch.einsum("kj,bjhw->bkhw", weight, state)
        return mixed * (1 + time.view(-1, 1, 1, 1) / 1000)

    x, probs = noise.double(), []
    times = [999, 666, 333, 0]
    for i, t in enumerate(times):
        logits = torch.einsum("kj,bjhw->bkhw", weight.double(), x) * (1 + t / 1000)
        p = logits.softmax(1)
        probs.append(p)
        if i < 3:
            here, there = ab[t].double(), ab[times[i + 1]].double()
            e = (x - here.sqrt() * (2 * p - 1)) / (1 - here).sqrt()
            x = there.sqrt() * (2 * p - 1) + (1 - there).sqrt() * e
    steps = list(ddim_steps(denoise, noise, ab, 4, False))
    assert [s.time for s in steps] == times and torch.equal(steps[0].state, noise)
    for step, p in zip(steps, probs, strict=True):
        assert torch.allclose(step.prob.double(), p, atol=1e-4)
        assert torch.allclose(step.prob.sum(1), torch.ones(2, 5, 5))
    again = ddim(denoise, noise, ab, 4, False)
    assert torch.equal(again, steps[-1].prob)


def test_sampler_keeps_no_graph_and_refuses_no_steps():
    weight = torch.ones(1, requires_grad=True)
    noise = torch.randn(1, 2, 4, 4)
    assert not ddim(lambda x, t: weight * x, noise, alpha_bars(), 2, False).requires_grad
    assert torch.is_grad_enabled()
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=str(steps)):
            ddim(lambda x, t: x, noise, alpha_bars(), steps, False)
