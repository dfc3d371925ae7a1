"""The controls and the verdicts of the benchmark `compression_extras.py`."""

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from prunery.pruners.models.sparse_activation import Site

from ...tiny_causal import saved_model


@pytest.fixture
def extras(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    for name in ("compression_extras", "compression_extras_report", "compression_runs", "fresh"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import compression_extras

    return compression_extras


@pytest.fixture
def model(tmp_path):
    return AutoModelForCausalLM.from_pretrained(saved_model(tmp_path, "llama")).eval()


def taken(model, path, ids):
    """What a module takes."""
    found = []
    handle = model.get_submodule(path).register_forward_hook(
        lambda module, args, out: found.append(args[0].clone())
    )
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return found[0]


def test_weights_left_unread_by_hand(extras, model):
    # Of a block of 32 wide: query and output 32 x 32, key and value 16 x 32, three of 64 x 32.
    block = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32
    dead = {
        (0, Site("mlp.gate_proj", "gate")): 0.5,  # up and down
        (1, Site("self_attn.q_proj", "input")): 0.25,  # query, key and value
        (2, Site("self_attn.q_proj", "alone")): 0.25,
    }
    spared = 0.5 * 2 * 64 * 32 + 0.25 * 2 * 32 * 32 + 0.25 * 32 * 32
    assert extras.share_unread(model, dead) == pytest.approx(spared / (3 * block))


def test_as_many_numbers_go_by_lot_and_readers_share_them(extras, model):
    ids = torch.arange(5, 105).reshape(2, 50)
    before = taken(model, "model.layers.0.self_attn.k_proj", ids)
    neurons = taken(model, "model.layers.1.mlp.down_proj", ids)
    dead = {
        (0, Site("self_attn.q_proj", "input")): 0.3,
        (1, Site("mlp.gate_proj", "gate")): 0.7,
    }
    extras.drop_at_random(model, dead, seed=3)
    key = taken(model, "model.layers.0.self_attn.k_proj", ids)
    assert float((key == 0).float().mean()) == pytest.approx(0.3, abs=0.03)
    assert torch.equal(key[key != 0], before[key != 0])  # not scaled up
    seen = []
    for name in ("q_proj", "v_proj"):
        model.get_submodule(f"model.layers.0.self_attn.{name}").register_forward_hook(
            lambda module, args, out: seen.append(args[0] == 0)
        )
    down = taken(model, "model.layers.1.mlp.down_proj", ids)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], key == 0)  # drawn anew
    assert float((down == 0).float().mean()) == pytest.approx(0.7, abs=0.03)
    assert not (neurons == 0).any()


def test_an_overlap_is_of_what_the_first_keeps(extras):
    one = {"a": torch.tensor([True, True, False]).numpy(), "b": torch.tensor([True]).numpy()}
    other = {"a": torch.tensor([True, False, True]).numpy(), "b": torch.tensor([True]).numpy()}
    assert extras.overlap(one, other) == pytest.approx(2 / 3)


def test_verdicts_are_of_paired_differences(extras):
    import compression_extras_report as report

    ours = {"seeds": [{"perplexity": value} for value in (5.0, 9.0, 7.0)]}
    theirs = {"seeds": [{"perplexity": value} for value in (6.0, 10.0, 8.0)]}
    found = report._paired(ours, theirs, "perplexity")
    assert found == pytest.approx((-1.0, 0.0), abs=1e-12)
    assert report._verdict((-1.0, 0.5), higher=False) == "better"
    assert report._verdict((-1.0, 0.5), higher=True) == "worse"
    assert report._verdict((-1.0, 1.5), higher=False) == "a tie"
    assert report._verdict((-1.0, float("nan")), higher=False) == "a tie"
    assert report._verdict((0.0, 0.0), higher=True) == "the same"


def test_the_random_search_looks_as_often_as_evolution(extras):
    evolution, once = extras.EVOLUTION, extras.AT_ONCE
    turns = evolution["rounds"] * evolution["generations"]
    assert once["rounds"] == once["generations"] == 1
    assert once["offspring"] == turns * evolution["offspring"]
    assert once["survivors"][:2] == [turns * count for count in evolution["survivors"][:2]]


def cell(values, **more):
    return {**more, "seeds": [dict(value) for value in values]}


def test_a_section_tells_every_part(extras):
    import compression_extras_report as report

    live = {"dead": 0.4, "unread": 0.2, "perplexity": 6.0, "random": 9.0}
    sets = {"domain": {"mrr": 0.9, "cosine": 0.8}, "general": {"mrr": 0.8, "cosine": 0.7}}
    others = {"domain": {"mrr": 0.7, "cosine": 0.8}, "general": {"mrr": 0.8, "cosine": 0.7}}
    found = {"start": 1.0, "best": 0.5, "evaluations": 10, "seconds": 3.0}
    trained = {"perplexity": 8.0, "zeros": 0.5, "share_trained": 0.1, "seconds": 2.0}
    plain = {"perplexity": 40.0, "zeros": 0.5}
    result = {
        "command": "python benchmarks/compression_extras.py",
        "model": "stories", "seeds": 2, "dense": 5.0, "tokens": 10,
        "machine": {
            "processor": "one", "threads": 1, "python": "3", "versions": {}, "load_before": 0.0,
        },
        "activation": [
            cell([live] * 2, name="CATS", level=0.5), cell([live] * 2, name="PPL-1%", level=None),
        ],
        "encoder": [
            cell([sets] * 2, name="dense", keep=1.0),
            cell([{**sets, "overlap": 1.0}] * 2, name="magnitude", keep=0.5),
            cell([{**others, "overlap": 0.6}] * 2, name="a", keep=0.5, step_agrees=False),
        ],
        "search": [
            cell([{"perplexity": 9.0}] * 2, plan="p", name="uniform"),
            cell([{"perplexity": 7.0, **found}] * 2, plan="p", name="evolution"),
            cell([{"perplexity": 8.0, **found}] * 2, plan="p", name="random search"),
        ],
        "recovery": [
            cell([plain] * 2, base="dense", name="nothing"),
            cell([trained] * 2, base="dense", name="MaskLoRA"),
            cell([plain] * 2, base="m", name="nothing"),
            cell([{**trained, "given_back": True}] * 2, base="m", name="MaskLoRA"),
            cell([trained] * 2, base="m", name="LoRA, zeros not kept"),
        ],
    }  # fmt: skip
    text = report.section(result)
    assert "Thresholds beat the lot in 2 of 2 cells." in text
    assert "| CATS | 50% | 40.0% | 20.0% | 6.00 ± 0.00 | 9.00 ± 0.00 |" in text
    assert "domain -0.200 ± 0.000 against magnitude (worse); 40.0000% of its" in text
    assert "does NOT leave the same weights" in text
    assert "| p | evolution | 7.00 ± 0.00 | -2.00 ± 0.00 | 1.000 to 0.500 | 10 | 3 |" in text
    assert "p: evolution -1.00 ± 0.00 against the random search (better)." in text
    assert "given back as it was in 2 seed(s)" in text
    assert "(8.00). Zeros given up, LoRA is at +0.00 ± 0.00 against MaskLoRA (the same)." in text
