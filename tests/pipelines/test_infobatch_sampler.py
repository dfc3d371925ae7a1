"""The InfoBatch sampler: full at both ends, unbiased between, the same by seed and epoch."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from prunery.errors import InputError
from prunery.pipelines.infobatch_sampler import InfoBatchSampler

LOSS = np.array([0.1, 0.2, 0.3, 0.4, 5.0, 6.0, 7.0, 8.0])  # mean 3.375: the first four are easy


def after_one_epoch(loss=LOSS, **options):
    """A sampler whose first epoch gave those losses."""
    sampler = InfoBatchSampler(len(loss), **{"epochs": 10, **options})
    taken = list(sampler)
    assert sorted(taken) == list(range(len(loss)))
    sampler.update(taken, loss[taken])
    return sampler


def test_easy_rows_are_skipped_and_weighed_up():
    sampler = after_one_epoch()
    drawn = []
    for _ in range(7):
        taken = list(sampler)
        assert {4, 5, 6, 7} <= set(taken)
        assert len(set(taken)) == len(taken)
        easy = [row for row in taken if row < 4]
        assert sampler.weight([4, 5, 6, 7]).tolist() == [1.0] * 4
        assert sampler.weight(easy).tolist() == [2.0] * len(easy)
        drawn.append(tuple(sorted(easy)))
    assert len(set(drawn)) > 2
    assert any(len(easy) < 4 for easy in drawn)


@pytest.mark.parametrize(
    ("epochs", "delta", "full_from"), [(10, 0.875, 8), (8, 0.875, 7), (10, 0.7, 7), (10, 0.29, 2)]
)
def test_the_last_epochs_have_all_rows(epochs, delta, full_from):
    loss = np.concatenate([np.full(60, 0.1), np.full(4, 9.0)])
    sampler = after_one_epoch(loss, epochs=epochs, delta=delta)
    for epoch in range(1, epochs):
        assert sampler.epoch == epoch
        n = len(list(sampler))
        assert (n == 64) == (epoch >= full_from), epoch
        if n == 64:
            assert (sampler.weight(np.arange(64)) == 1).all()


def test_the_first_epoch_has_all_rows_even_with_losses_known():
    sampler = InfoBatchSampler(64, epochs=10)
    sampler.update(np.arange(64), np.arange(64.0))
    assert len(list(sampler)) == 64
    assert len(list(sampler)) < 64


def test_delta_1_never_goes_back_to_all_rows():
    loss = np.concatenate([np.full(60, 0.1), np.full(4, 9.0)])
    sampler = after_one_epoch(loss, epochs=4, delta=1.0)
    assert all(len(list(sampler)) < 64 for _ in range(3))


def test_the_expected_gradient_is_that_of_all_rows():
    rng = np.random.default_rng(0)
    loss = rng.exponential(1.0, 40)
    gradient = rng.normal(size=(40, 3)) + 1.0
    for ratio in (0.3, 0.5, 0.8):
        sums = []
        for seed in range(600):
            sampler = after_one_epoch(loss, seed=seed, ratio=ratio)
            taken = list(sampler)
            weight = sampler.weight(taken).numpy()
            sums.append((gradient[taken] * weight[:, None]).sum(axis=0))
        error = np.std(sums, axis=0) / np.sqrt(len(sums))
        np.testing.assert_array_less(
            np.abs(np.mean(sums, axis=0) - gradient.sum(axis=0)), 4 * error + 1e-9
        )


def test_the_draw_is_a_function_of_seed_epoch_and_id():
    ids = np.array([3, 7, 7 << 40, 9, 11, 2, 5, 1])

    def epochs(seed, order):
        sampler = InfoBatchSampler(ids[order], epochs=10, seed=seed)
        taken = list(sampler)
        sampler.update(taken, LOSS[order][taken])
        return [list(sampler) for _ in range(5)]

    straight = np.arange(8)
    assert epochs(0, straight) == epochs(0, straight)
    assert epochs(0, straight) != epochs(1, straight)
    back = straight[::-1]
    for one, other in zip(epochs(0, straight), epochs(0, back), strict=True):
        assert set(one) == {int(back[row]) for row in other}


def test_ids_far_apart_in_int64_are_told_apart():
    """In float32 these ids are one number, so all would share one draw."""
    ids = (1 << 60) + np.arange(64)
    sampler = InfoBatchSampler(ids, epochs=10)
    taken = list(sampler)
    sampler.update(taken, np.where(np.arange(64) < 60, 0.1, 9.0)[taken])
    assert 10 < len([row for row in sampler if row < 60]) < 50


def test_a_constant_loss_skips_nothing():
    sampler = after_one_epoch(np.full(31, 0.1))
    assert len(list(sampler)) == 31


def test_a_loss_may_be_negative():
    assert list(after_one_epoch(LOSS - 100)) == list(after_one_epoch(LOSS))


def test_rows_whose_loss_is_not_known_stay():
    sampler = InfoBatchSampler(70, epochs=10)
    list(sampler)
    assert len(list(sampler)) == 70
    sampler.update(np.arange(60), np.concatenate([np.full(56, 0.1), np.full(4, 9.0)]))
    taken = set(sampler)
    assert set(range(56, 70)) <= taken
    assert len(taken) < 70
    assert (sampler.weight(np.arange(56, 70)) == 1).all()


def test_losses_count_from_the_next_epoch_on():
    sampler = after_one_epoch()
    epoch = iter(sampler)
    first = next(epoch)
    before = sampler.weight(np.arange(8))
    length = len(sampler)
    sampler.update(np.arange(8), LOSS[::-1].copy())
    assert torch.equal(sampler.weight(np.arange(8)), before)
    assert len(sampler) == len([first, *epoch]) == length
    assert set(range(4)) <= set(sampler)  # the first four are the hard ones now


def test_its_length_is_that_of_the_epoch():
    sampler = after_one_epoch()
    for _ in range(9):
        said = len(sampler)
        assert said == len(list(sampler))


def test_it_goes_on_from_its_state():
    whole, first = after_one_epoch(seed=5), after_one_epoch(seed=5)
    for sampler in (whole, first):
        list(sampler)
    state = first.state_dict()
    resumed = InfoBatchSampler(8, epochs=10, seed=5)
    resumed.load_state_dict(state)
    assert resumed.epoch == 2
    assert [list(resumed) for _ in range(6)] == [list(whole) for _ in range(6)]
    first.update([0], [99.0])
    assert state["loss"][0] == 0.1
    with pytest.raises(InputError, match="these 9 rows"):
        InfoBatchSampler(9, epochs=10).load_state_dict(state)


def test_it_serves_a_data_loader():
    x = torch.arange(64.0)
    rows = TensorDataset(x, torch.arange(64))
    sampler = InfoBatchSampler(64, epochs=6, delta=1.0)
    loader = DataLoader(rows, batch_size=8, sampler=sampler)
    seen = []
    for _ in range(6):
        taken = []
        for value, index in loader:
            sampler.update(index, value)
            assert sampler.weight(index).shape == index.shape
            taken += index.tolist()
        seen.append(len(taken))
    assert seen[0] == 64
    assert all(40 <= n < 64 for n in seen[1:])


def test_what_does_not_fit_is_refused():
    for options in ({"ratio": 1.0}, {"ratio": -0.1}, {"delta": 1.5}, {"epochs": 0}):
        with pytest.raises(InputError):
            InfoBatchSampler(4, **{"epochs": 3, **options})
    with pytest.raises(InputError, match="unique"):
        InfoBatchSampler([1, 2, 1], epochs=3)
    sampler = InfoBatchSampler(4, epochs=3)
    with pytest.raises(InputError, match="one finite loss for each of 2 rows"):
        sampler.update([0, 1], [1.0, float("nan")])
    with pytest.raises(InputError, match="found shape"):
        sampler.update([0, 1], torch.tensor(1.0))
    for index in ([0, 4], [-1], [0.5], 1):
        with pytest.raises(InputError, match="positions"):
            sampler.weight(index)
    assert sampler.weight(np.zeros(0, np.int64)).shape == (0,)
    assert list(InfoBatchSampler(0, epochs=2)) == []
