import numpy as np
import pytest
import torch

from prunery.errors import InputError, ModelError
from prunery.pipelines.compression.quality import Rows, compare, load_packed, masked_rows

from ...tiny_causal import saved_model, tiny_model


def given(lengths, seed=0, ignored=0):
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(3, 300, length) for length in lengths]
    targets = [np.arange(length) >= ignored for length in lengths]
    return Rows(np.arange(len(lengths)) + 100, tokens, targets)


def by_hand(model, row):
    """Log probabilities (L, V) of a row alone, float64 with NumPy."""
    with torch.no_grad():
        logits = model(torch.from_numpy(row)[None]).logits[0].double().numpy()
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("ignored", [0, 3])
def test_losses_and_divergence_are_as_by_hand(ignored):
    dense, other = tiny_model("llama", seed=0), tiny_model("llama", seed=1)
    rows = given([9, 4, 14, 2], ignored=ignored)
    first, second = compare(dense, other, rows, batch_tokens=28)
    for number, (row, target) in enumerate(zip(rows.tokens, rows.targets, strict=True)):
        at = [t for t in range(1, len(row)) if target[t]]
        p, q = by_hand(dense, row), by_hand(other, row)
        assert second.count[number] == first.count[number] == len(at)
        nll = -sum(q[t - 1, row[t]] for t in at)
        kl = sum((np.exp(p[t - 1]) * (p[t - 1] - q[t - 1])).sum() for t in at)
        same = sum(p[t - 1].argmax() == q[t - 1].argmax() for t in at)
        np.testing.assert_allclose(second.nll[number], nll, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(second.kl[number], kl, rtol=1e-3, atol=1e-5)
        assert second.same[number] == same
        np.testing.assert_allclose(
            first.nll[number], -sum(p[t - 1, row[t]] for t in at), rtol=1e-4, atol=1e-6
        )
    assert first.kl.tolist() == [0.0] * 4 and first.agreement == 1
    np.testing.assert_allclose(
        second.perplexity, np.exp(second.nll.sum() / second.count.sum()), rtol=1e-12
    )


def test_a_model_against_itself_loses_nothing():
    model = tiny_model("llama")
    first, second = compare(model, model, given([8, 8, 5]))
    assert np.array_equal(first.nll, second.nll)
    assert second.mean_kl == 0 and second.agreement == 1


def test_an_encoder_is_scored_on_places_it_does_not_see():
    dense, other = tiny_model("bert", seed=0), tiny_model("bert", seed=1)
    rows = given([20, 6])
    hidden, read_against = masked_rows(rows, 2, 0.15, seed=5)
    for tokens, masked, target in zip(rows.tokens, hidden.tokens, hidden.targets, strict=True):
        assert target.sum() == max(1, round(0.15 * len(tokens)))
        assert (masked[target] == 2).all() and np.array_equal(masked[~target], tokens[~target])
    _, second = compare(dense, other, read_against, read=hidden, causal=False, batch_tokens=26)
    for number in range(2):
        at = np.flatnonzero(hidden.targets[number])
        q = by_hand(other, hidden.tokens[number])
        nll = -q[at, rows.tokens[number][at]].sum()
        np.testing.assert_allclose(second.nll[number], nll, rtol=1e-4)
    # the same places whatever stands beside the row, others for another seed
    alone, _ = masked_rows(Rows(rows.ids[1:], rows.tokens[1:], rows.targets[1:]), 2, 0.15, seed=5)
    assert np.array_equal(alone.targets[0], hidden.targets[1])
    others = [masked_rows(rows, 2, 0.15, seed=s)[0].targets[0] for s in range(4)]
    assert any(not np.array_equal(one, hidden.targets[0]) for one in others)


def test_rows_without_targets_other_vocabularies_and_nan_are_refused():
    model = tiny_model("llama")
    with pytest.raises(InputError, match="expected rows with tokens to score"):
        compare(model, model, given([4, 4], ignored=9))
    with pytest.raises(InputError, match="row 1: expected at least 2 tokens"):
        compare(model, model, given([4, 1]))
    small = tiny_model("llama", vocab_size=310)
    with pytest.raises(InputError, match="found 300 and 310 entries"):
        compare(model, small, given([4, 4]))
    broken = tiny_model("llama")
    broken.lm_head.weight.data[5] = float("nan")
    with pytest.raises(ModelError, match=r"row 100: expected finite logits"):
        compare(model, broken, given([4, 4]))


def test_loading_says_what_is_missing(tmp_path):
    folder = saved_model(tmp_path, "llama")
    assert not any(p.requires_grad for p in load_packed(folder).parameters())
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing or of another shape: .*layers\.1\.mlp\.up"):
        load_packed(folder)
