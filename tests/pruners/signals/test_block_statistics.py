"""Each statistic against its definition, by plain hooks over whole models in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.errors import InputError
from prunery.pipelines.compression.journal import LayerJournal
from prunery.pipelines.compression.statistics import layer_statistics
from prunery.pipelines.compression.walk import batches_of, walk
from prunery.pruners.models.streamed_model import StreamedModel
from prunery.pruners.signals.block_statistics import (
    FORWARD_STATISTICS,
    TokenWeights,
    check_wanted,
    merge_statistics,
)
from prunery.pruners.signals.block_sums import InputSums
from prunery.pruners.signals.moments import Moments

from ...pipelines.compression import whole_model
from ...tiny_causal import ARCHITECTURES, saved_model


def rows(count=6, longest=14, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 300, rng.integers(2, longest)) for _ in range(count)]


def collect(folder, work, given, wanted=FORWARD_STATISTICS, *, tokens=40, **options):
    model = StreamedModel(folder, attention=options.pop("attention", "sdpa"))
    made = []

    def visit(here):
        made.append(layer_statistics(here, frozenset(wanted), **options))
        return {}, []

    walk(model, batches_of(given, tokens=tokens, pad=2), LayerJournal(work), visit)
    return made


def close(got, wanted, rtol=2e-4):
    """Within a share of the largest value: sums over tokens lose digits in float32 models."""
    wanted = torch.as_tensor(wanted, dtype=torch.float64).detach()
    torch.testing.assert_close(
        got.double(), wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()) + 1e-12
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(statistics of each layer, records of each layer, whole model) by architecture."""
    kept = {}

    def of(name):
        if name not in kept:
            folder = tmp_path_factory.mktemp("model")
            given, model = rows(), saved_model(folder, name)
            whole = whole_model.whole(model, name)
            kept[name] = (
                collect(model, folder / "work", given),
                whole_model.record(whole, name, given),
                whole,
            )
        return kept[name]

    return of


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_enters_each_matrix(made, name):
    statistics, records, _ = made(name)
    for layer, records_of in zip(statistics, records, strict=True):
        places = {place for place in records_of[0] if "proj" in place or place in _NAMED}
        assert len(places) >= 2
        for place in places:
            x = torch.cat([whole_model.inputs(row, place) for row in records_of]).double()
            assert int(layer[place, "count"]) == len(x)
            close(layer[place, "sum_squares"], x.square().sum(0))
            close(layer[place, "mean"], x.mean(0))
            close(layer[place, "m2"], (x - x.mean(0)).square().sum(0))
            close(layer[place, "gram"], x.T @ x)
            r = torch.cat([whole_model.token_weights(row, 0.005, 1) for row in records_of])
            close(layer[place, "weighted_gram"], (x * r[:, None]).T @ x, 1e-3)


_NAMED = {
    *whole_model.PLACES["gpt2"][2].split(),
    *whole_model.PLACES["opt"][2].split(),
    *whole_model.PLACES["bert"][2].split(),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_block_and_its_attention(made, name):
    statistics, records, _ = made(name)
    for layer, records_of in zip(statistics, records, strict=True):
        cosine, columns = [], torch.zeros(14, dtype=torch.float64)
        for row in records_of:
            before, after = row["in"][0], row["out"]
            after = (after[0] if isinstance(after, tuple) else after)[0]
            cosine.append(torch.nn.functional.cosine_similarity(before, after, dim=-1))
            received = whole_model.received(row)
            columns[: len(received)] += received
        cosine = torch.cat(cosine)
        assert int(layer["", "count"]) == len(cosine)
        close(layer["", "cosine"], cosine.sum())
        close(layer["", "angle"], cosine.acos().sum() / torch.pi)
        place = whole_model.PLACES[name][1]
        longest = max(len(whole_model.received(row)) for row in records_of)
        close(layer[place, "attention"], columns[:longest])
        reach = [
            sum(len(whole_model.received(row)) > at for row in records_of) for at in range(longest)
        ]
        assert layer[place, "attention_rows"].tolist() == reach


@pytest.mark.parametrize("name", whole_model.MOE)
def test_experts(made, name):
    statistics, records, whole = made(name)
    checked = 0
    for number, (layer, records_of) in enumerate(zip(statistics, records, strict=True)):
        if "x" not in records_of[0]:
            assert not any("expert" in stat for _, stat in layer)
            continue
        checked += 1
        block = whole.get_submodule("model.layers")[number]
        sums = {name: torch.zeros(4, dtype=torch.float64) for name in _EXPERT}
        grams = torch.zeros(4, 32, 32, dtype=torch.float64)
        inner = [[] for _ in range(4)]
        for row in records_of:
            g, out = whole_model.gates(row, block, 4)
            norm, x = out.norm(dim=-1).T, whole_model.inputs(row, "x")
            h = whole_model.inputs(row, "residual")
            y = whole_model.inputs(row, "routed")
            far = 1 - torch.nn.functional.cosine_similarity(h, h + y, dim=-1)
            sums["expert_tokens"] += (g > 0).sum(0)
            sums["expert_gate"] += g.sum(0)
            sums["expert_norm"] += (norm * (g > 0)).sum(0)
            sums["expert_reap"] += (g * norm).sum(0)
            sums["expert_easy"] += (g * norm * far.clamp(min=0)[:, None]).sum(0)
            for expert in range(4):
                mine = x[g[:, expert] > 0]
                grams[expert] += mine.T @ mine
                inner[expert].append(mine)
        for stat, wanted in sums.items():
            close(layer["mlp.experts", stat], wanted)
        for expert in range(4):
            place = f"mlp.experts.{expert}.gate_proj"
            close(layer[place, "gram"], grams[expert])
            assert int(layer[place, "count"]) == int(sums["expert_tokens"][expert])
            x = torch.cat(inner[expert])
            if len(x):
                close(layer[place, "mean"], x.mean(0))
    assert checked >= 2


_EXPERT = ["expert_tokens", "expert_gate", "expert_norm", "expert_reap", "expert_easy"]


@pytest.mark.parametrize("name", ["llama", "mistral", "opt"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("r_min", "power"), [(0.005, 2), (0.3, 1)])
def test_token_weights_by_option(tmp_path, name, attention, r_min, power):
    folder, given = saved_model(tmp_path, name), rows()
    made = collect(
        folder,
        tmp_path / "work",
        given,
        {"weighted_gram"},
        attention=attention,
        weights=TokenWeights(r_min, power),
    )
    records = whole_model.record(whole_model.whole(folder, name), name, given)
    place = whole_model.PLACES[name][2].split()[0]
    for layer, records_of in zip(made, records, strict=True):
        x = torch.cat([whole_model.inputs(row, place) for row in records_of])
        r = torch.cat([whole_model.token_weights(row, r_min, power) for row in records_of])
        close(layer[place, "weighted_gram"], (x * r[:, None]).T @ x, 1e-3)
        assert {stat for _, stat in layer} == {"weighted_gram", "count"}


def test_token_weights_by_hand():
    received = torch.tensor([[3.0, 1.0, 2.0, 9.0], [5.0, 5.0, 0.0, 0.0], [7.0, 0.0, 0.0, 0.0]])
    valid = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    made = TokenWeights(r_min=0.5)(received, valid)
    # 1, 1/2, 3/4 over their mean 3/4; equal ones and a lone one weigh 1.
    wanted = torch.tensor([[4 / 3, 2 / 3, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]).double()
    torch.testing.assert_close(made, wanted)
    torch.testing.assert_close(TokenWeights(0.5, 2)(received, valid), wanted**2)


@pytest.mark.parametrize("name", ["llama", "opt", "bert", "mixtral"])
def test_padding_and_batching_change_rounding_alone(tmp_path, name):
    folder = saved_model(tmp_path, name)
    alone = collect(folder, tmp_path / "alone", rows(), tokens=1)
    together = collect(folder, tmp_path / "together", rows(), tokens=1000)
    for one, other in zip(alone, together, strict=True):
        assert set(one) == set(other)
        for key, array in one.items():
            assert array.dtype == other[key].dtype
            close(other[key], array, 1e-3)


def test_statistics_leave_the_outputs_and_the_block_alone(tmp_path):
    folder, given = saved_model(tmp_path, "llama"), rows()
    model = StreamedModel(folder)
    batches = batches_of(given, tokens=40, pad=2)
    plain = LayerJournal(tmp_path / "plain")
    walk(model, batches, plain, lambda visit: ({}, []))
    watched = LayerJournal(tmp_path / "watched")

    def visit(here):
        configs = [module.config for module in here.block.modules() if hasattr(module, "config")]
        layer_statistics(here, FORWARD_STATISTICS)
        assert configs == [m.config for m in here.block.modules() if hasattr(m, "config")]
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in here.block.modules())
        return {}, []

    walk(model, batches, watched, visit)
    for number in range(len(batches)):
        assert torch.equal(plain.hidden(3, number), watched.hidden(3, number))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_run_that_stops_early_sees_the_same(tmp_path, name):
    """Where outputs do not go on, the last matrix need not run; experts run to the end."""
    folder, given = saved_model(tmp_path, name), rows()
    wanted = frozenset({"gram", "sum_squares", "mean", "m2", "attention"})
    model = StreamedModel(folder)
    ran = []

    def visit(here):
        whole = layer_statistics(here, wanted)
        last = list(here.layout.matrices(here.block))[-1]
        module = here.block.get_submodule(last.name)
        hook = module.register_forward_hook(lambda *given: ran.append(last.name))
        stopped = layer_statistics(here, wanted, keep=False)
        hook.remove()
        assert set(whole) == set(stopped)
        assert all(torch.equal(whole[key], stopped[key]) for key in whole)
        return {}, []

    walk(model, batches_of(given, tokens=40, pad=2), LayerJournal(tmp_path / "w"), visit)
    assert not ran or model.layout.experts is not None


def test_grams_are_symmetric_to_the_last_bit_and_sums(tmp_path):
    sums = InputSums(600, frozenset({"gram", "weighted_gram", "sum_squares"}), torch.device("cpu"))
    rng = torch.Generator().manual_seed(0)
    x, r = torch.randn(300, 600, generator=rng), torch.rand(300, generator=rng)
    for part in (slice(0, 1), slice(1, 200), slice(200, 300)):
        sums.update(x[part])
        sums.update_weighted(x[part], r[part])
    found = sums.result()
    wide = x.double()
    close(found["gram"], wide.T @ wide, 1e-5)
    close(found["weighted_gram"], wide.T @ (wide * r.double()[:, None]), 1e-5)
    torch.testing.assert_close(found["sum_squares"], wide.square().sum(0), rtol=1e-6, atol=0)
    assert all(torch.equal(found[n], found[n].T) for n in ("gram", "weighted_gram"))


def test_hooks_go_when_the_block_fails(tmp_path):
    model = StreamedModel(saved_model(tmp_path, "mixtral"))

    def visit(here):
        here.block.get_submodule("mlp.gate").weight.data.fill_(float("nan"))
        with pytest.raises(Exception, match="finite|index|nan"):
            layer_statistics(here, FORWARD_STATISTICS)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in here.block.modules())
        here.dropped = True
        return {}, []

    walk(model, batches_of(rows(), tokens=40, pad=2), LayerJournal(tmp_path / "w"), visit)


def test_nothing_wanted_runs_nothing_unless_outputs_are_kept(tmp_path):
    model = StreamedModel(saved_model(tmp_path, "llama"))
    seen = []

    def visit(here):
        assert layer_statistics(here, frozenset({"gradient"}), keep=False) == {}
        seen.append(here.forwarded)
        assert layer_statistics(here, frozenset()) == {}
        seen.append(here.forwarded)
        return {}, []

    walk(model, batches_of(rows(), tokens=40, pad=2), LayerJournal(tmp_path / "w"), visit)
    assert seen == [False, True] * 3


def test_an_unknown_statistic_is_named():
    with pytest.raises(InputError, match=r"gram.*found kurtosis"):
        check_wanted(frozenset({"gram", "kurtosis"}))


def test_a_dropped_layer_has_statistics_of_no_token(tmp_path):
    model = StreamedModel(saved_model(tmp_path, "llama"))
    made = []

    def visit(here):
        here.dropped = True
        made.append(layer_statistics(here, FORWARD_STATISTICS))
        return {}, []

    walk(model, batches_of(rows(), tokens=40, pad=2), LayerJournal(tmp_path / "w"), visit)
    assert int(made[0]["mlp.down_proj", "count"]) == 0
    assert not made[0]["mlp.down_proj", "gram"].any()
    close(made[0]["", "cosine"], float(made[0]["", "count"]))


# -- merging -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2_moe"])
def test_parts_merged_are_one_pass(tmp_path, name):
    folder, given = saved_model(tmp_path, name), rows(9)
    whole = collect(folder, tmp_path / "whole", given)
    parts = [
        collect(folder, tmp_path / f"part{k}", given[start : start + 3])
        for k, start in enumerate((0, 3, 6))
    ]
    for layer, wanted in enumerate(whole):
        a, b, c = (part[layer] for part in parts)
        left = merge_statistics(merge_statistics(a, b), c)
        right = merge_statistics(a, merge_statistics(c, b))
        assert set(left) == set(wanted)
        for key, array in wanted.items():
            assert left[key].dtype == array.dtype and left[key].shape == array.shape
            close(left[key], array, 1e-3)
            close(right[key], left[key], 1e-6)


def test_parts_of_other_statistics_or_sizes_do_not_merge():
    one = {("a", "count"): torch.tensor(1), ("a", "gram"): torch.zeros(2, 2)}
    with pytest.raises(InputError, match="'gram' of module 'a' in one alone"):
        merge_statistics(one, {("a", "count"): torch.tensor(1)})
    with pytest.raises(InputError, match=r"'gram' of module 'a'.*\(2, 2\) and \(3, 3\)"):
        merge_statistics(one, {**one, ("a", "gram"): torch.zeros(3, 3)})


def test_a_mean_without_its_count_does_not_merge():
    one = {("a", "mean"): torch.ones(2)}
    with pytest.raises(InputError, match="expected count beside 'mean' of module 'a'"):
        merge_statistics(one, one)


def test_merging_leaves_the_parts_alone():
    one = {("", "attention"): torch.ones(2), ("", "attention_rows"): torch.ones(2)}
    other = {("", "attention"): torch.ones(3), ("", "attention_rows"): torch.ones(3)}
    made = merge_statistics(one, other)
    assert made["", "attention"].tolist() == [2, 2, 1]
    assert one["", "attention"].tolist() == [1, 1] and other["", "attention"].tolist() == [1] * 3


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 600), min_size=1, max_size=4),
    st.floats(-1e6, 1e6),
    st.integers(0, 10_000),
)
def test_moments_in_parts_are_those_of_all(lengths, shift, seed):
    rng = np.random.default_rng(seed)
    parts = [torch.from_numpy(rng.normal(shift, 1.0, (n, 3))) for n in lengths]
    made = Moments.empty(3)
    for part in parts:
        made.update(part)
    x = torch.cat(parts)
    assert made.count == len(x)
    if len(x):
        torch.testing.assert_close(made.mean, x.mean(0), rtol=1e-9, atol=1e-9)
        wanted = (x - x.mean(0)).square().sum(0)
        torch.testing.assert_close(made.m2, wanted, rtol=1e-7, atol=1e-5)
    else:
        assert not made.mean.any() and not made.m2.any()


def test_a_variance_beside_a_large_mean_keeps_its_digits():
    x = torch.tensor([[1e8 + 1], [1e8 + 2], [1e8 + 3]], dtype=torch.float64)
    made = Moments.empty(1)
    for row in x:
        made.update(row[None])
    assert made.m2.item() == pytest.approx(2.0, rel=1e-6)
