import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from prunery.errors import InputError, ModelError
from prunery.pipelines.compression.journal import LayerJournal
from prunery.pipelines.compression.walk import batches_of, walk
from prunery.pruners.models.streamed_model import StreamedModel

from ...tiny_causal import saved_model


def rows(count=7, longest=20, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 300, rng.integers(4, longest)) for _ in range(count)]


def outputs(journal, model, batches):
    found = {}
    for number, batch in enumerate(batches):
        hidden = journal.hidden(model.layers, number)
        with torch.no_grad():
            logits = model.logits(hidden, batch.input_ids, batch.valid)
        for place, row in enumerate(batch.rows):
            found[int(row)] = logits[place][batch.valid[place]]
    return found


def zero_up(visit):
    visit.forward()
    visit.block.get_submodule("mlp.up_proj").weight.data[:8] = 0
    visit.forward()
    return {n: p.data for n, p in visit.block.named_parameters()}, [{"layer": visit.layer}]


def put_back(visit, tensors, rows):
    visit.model.fill(visit.block, tensors, visit.layer)


def test_batches_hold_every_row_once_and_few_tokens():
    given = rows(50)
    made = batches_of(given, tokens=64, pad=2)
    assert sorted(int(r) for b in made for r in b.rows) == list(range(50))
    for batch in made:
        assert batch.input_ids.numel() <= 64 or len(batch.rows) == 1
        for place, row in enumerate(batch.rows):
            assert torch.equal(
                batch.input_ids[place][batch.valid[place]], torch.from_numpy(given[row])
            )
            assert (batch.input_ids[place][~batch.valid[place]] == 2).all()


def test_a_walk_that_changes_nothing_gives_the_models_logits(tmp_path):
    folder = saved_model(tmp_path, "llama")
    model, given = StreamedModel(folder), rows()
    batches = batches_of(given, tokens=40)
    journal = LayerJournal(tmp_path / "work")
    walk(model, batches, journal, lambda visit: ({}, []))
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    for row, logits in outputs(journal, model, batches).items():
        with torch.no_grad():
            theirs = whole(torch.from_numpy(given[row])[None]).logits[0]
        torch.testing.assert_close(logits, theirs, rtol=1e-4, atol=1e-4)


def test_the_last_outputs_are_left_out_on_request(tmp_path):
    model, batches = StreamedModel(saved_model(tmp_path, "llama")), batches_of(rows(), tokens=40)
    journal = LayerJournal(tmp_path / "work")
    walk(model, batches, journal, lambda visit: ({}, []), outputs=False)
    assert journal.done() == model.layers
    assert not journal.has_hidden(model.layers, 1)
    walk(model, batches, journal, lambda visit: pytest.fail("all layers are done"), outputs=False)


def test_counted_tokens_follow_their_rows():
    given = rows(10)
    marks = [np.arange(len(row)) % 3 == 0 for row in given]
    for batch in batches_of(given, tokens=40, counted=marks):
        for place, row in enumerate(batch.rows):
            assert np.array_equal(batch.counted[place][batch.valid[place]], marks[row])
        assert not (batch.counted & ~batch.valid).any()


@pytest.mark.parametrize("given", [[], [[5]], [[5, 6], []]])
def test_no_rows_and_short_rows_are_refused(given):
    with pytest.raises(InputError, match="calibration row"):
        batches_of(given, tokens=40)


class Killed(Exception):
    pass


@pytest.mark.parametrize("stop", [0, 1, 2])
@pytest.mark.parametrize("lost", [False, True])
def test_a_killed_walk_goes_on_with_the_same_bytes(tmp_path, stop, lost):
    model = StreamedModel(saved_model(tmp_path, "llama"))
    batches = batches_of(rows(), tokens=40)
    whole = LayerJournal(tmp_path / "whole")
    walk(model, batches, whole, zero_up, replay=put_back)

    cut = LayerJournal(tmp_path / "cut")
    visited = []

    def killed(visit):
        if visit.layer == stop:
            visit.forward()
            raise Killed
        return zero_up(visit)

    with pytest.raises(Killed):
        walk(model, batches, cut, killed, replay=put_back)
    if lost:
        for path in cut.folder.glob("hidden-*"):
            path.unlink()

    def again(visit):
        visited.append(visit.layer)
        return zero_up(visit)

    walk(model, batches, cut, again, replay=put_back)
    assert visited == list(range(stop, 3))
    for layer in range(3):
        assert whole.file(layer).read_bytes() == cut.file(layer).read_bytes()
        assert cut.rows(layer) == [{"layer": layer}]
    for number in range(len(batches)):
        assert torch.equal(whole.hidden(3, number), cut.hidden(3, number))


def test_a_damaged_layer_is_made_again(tmp_path):
    model = StreamedModel(saved_model(tmp_path, "llama"))
    batches = batches_of(rows(), tokens=40)
    journal = LayerJournal(tmp_path / "work")
    walk(model, batches, journal, zero_up, replay=put_back)
    before = journal.file(1).read_bytes()
    journal.file(1).write_bytes(before[:-1])
    assert journal.done() == 1
    walk(model, batches, journal, zero_up, replay=put_back)
    assert journal.file(1).read_bytes() == before


def test_a_dropped_layer_passes_its_inputs_on(tmp_path):
    model = StreamedModel(saved_model(tmp_path, "llama"))
    batches = batches_of(rows(), tokens=40)
    seen = {}

    def drop_the_second(visit):
        seen[visit.layer] = visit.inputs(0)
        visit.dropped = visit.layer == 1
        return {}, []

    walk(model, batches, LayerJournal(tmp_path / "work"), drop_the_second)
    assert torch.equal(seen[1], seen[2]) and not torch.equal(seen[0], seen[1])


def test_outputs_that_are_no_numbers_name_the_layer(tmp_path):
    model = StreamedModel(saved_model(tmp_path, "llama"))

    def break_it(visit):
        if visit.layer == 1:
            visit.block.get_submodule("mlp.up_proj").weight.data[0, 0] = float("nan")
        return {}, []

    with pytest.raises(ModelError, match="layer 1: expected finite outputs"):
        walk(model, batches_of(rows(), tokens=40), LayerJournal(tmp_path / "work"), break_it)
