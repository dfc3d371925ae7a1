"""Token signals against plain logits, for every make of model and layout of batch."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MambaConfig, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import CausalLMOutput

from prunery.errors import InputError, ModelError
from prunery.pruners.signals import tokens
from prunery.pruners.signals.tokens import PromptAttention, answer_alone, score_tokens

from .causal_models import CONFIGS, VOCABULARY, padded, rows, tiny_model


def truth(model, row):
    """(loss, entropy, log_sum_exp, rank) of every token of one unpadded row but the first."""
    with torch.no_grad():
        logits = model(input_ids=row[None]).logits[0, :-1].double()
    log = logits.log_softmax(-1)
    target = row[1:, None]
    return (
        -log.gather(1, target)[:, 0],
        -(log.exp() * log).sum(1),
        logits.logsumexp(1),
        (logits > logits.gather(1, target)).sum(1),
    )


def random_targets(ids, mask, seed=3):
    chosen = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    first = mask.cumsum(1) == 1
    return chosen & mask.bool() & ~first


def check(scores, model, found, offsets):
    """Hold scores against the truth of each row; row i starts at column offsets[i]."""
    made = [truth(model, row) for row in found]
    for i in range(len(scores.row)):
        row, place = int(scores.row[i]), int(scores.position[i]) - offsets[int(scores.row[i])]
        loss, entropy, lse, rank = (values[place - 1] for values in made[row])
        np.testing.assert_allclose(scores.loss[i], loss, atol=3e-5)
        np.testing.assert_allclose(scores.entropy[i], entropy, atol=3e-5)
        np.testing.assert_allclose(scores.log_sum_exp[i], lse, atol=3e-5)
        assert scores.target_rank[i] == rank


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_those_of_the_plain_logits(name, side):
    model = tiny_model(name)
    found = rows(11, 5, 8)
    ids, mask = padded(found, side)
    targets = random_targets(ids, mask)
    scores = score_tokens(model, ids, targets, attention_mask=mask, rank=True)
    assert (scores.row * 100 + scores.position).tolist() == sorted(
        100 * r + p for r, p in targets.nonzero().tolist()
    )
    assert scores.loss.dtype == scores.entropy.dtype == scores.log_sum_exp.dtype == torch.float32
    assert len(scores.row) == int(targets.sum()) > 8
    assert scores.prompt_attention is None
    width = ids.shape[1]
    check(scores, model, found, [0 if side == "right" else width - len(row) for row in found])


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_packed_documents_do_not_see_each_other(name, padding):
    model = tiny_model(name)
    first, second = rows(7, 6)
    ids = torch.cat([first, second])[None]
    positions = torch.cat([torch.arange(7), torch.arange(6)])[None]
    mask = torch.ones_like(ids)
    if padding != "none":
        pads = torch.zeros(1, 2, dtype=torch.int64)
        join = (lambda a: [a, pads]) if padding == "right" else (lambda a: [pads, a])
        ids, positions, mask = (torch.cat(join(a), 1) for a in (ids, positions, mask))
    targets = mask.bool() & (positions > 0)
    scores = score_tokens(
        model, ids, targets, position_ids=positions, attention_mask=mask, rank=True
    )
    parts = [truth(model, row) for row in (first, second)]
    for got, name_ in zip(
        (scores.loss, scores.entropy, scores.log_sum_exp, scores.target_rank),
        range(4),
        strict=True,
    ):
        wanted = torch.cat([part[name_] for part in parts])
        np.testing.assert_allclose(got, wanted, atol=3e-5)


def test_the_model_keeps_its_mode_and_gets_no_gradient():
    model = tiny_model("gpt2").train()
    model.transformer.h[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    (row,) = rows(6)
    targets = torch.ones(1, 6, dtype=torch.bool)
    targets[0, 0] = False
    scores = score_tokens(model, row[None], targets)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not scores.loss.requires_grad
    assert not scores.loss.is_inference()
    # Dropout is off: what was scored is the model in eval mode.
    np.testing.assert_allclose(scores.loss, truth(model.eval(), row)[0], atol=3e-5)


def test_the_mode_is_restored_after_a_failure(monkeypatch):
    model = tiny_model("llama").train()
    monkeypatch.setattr(tokens, "_run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score_tokens(model, rows(3)[0][None], torch.tensor([[False, True, True]]))
    assert all(module.training for module in model.modules())


def test_low_precision_and_autocast():
    model = tiny_model("llama")
    (row,) = rows(9)
    targets = torch.arange(9)[None] > 0
    exact = truth(model, row)[0]
    with torch.autocast("cpu", torch.bfloat16):
        cast = score_tokens(model, row[None], targets)
    low = score_tokens(model.bfloat16(), row[None], targets)
    for scores in (cast, low):
        assert scores.loss.dtype == torch.float32
        np.testing.assert_allclose(scores.loss, exact, atol=0.3)


def test_no_target_at_all():
    scores = score_tokens(
        tiny_model("llama"),
        rows(4)[0][None],
        torch.zeros(1, 4, dtype=torch.bool),
        rank=True,
        attention=PromptAttention(),
    )
    for values in (scores.row, scores.loss, scores.target_rank, scores.prompt_attention):
        assert values.shape == (0,)


def test_nan_weights_give_nan_and_not_a_number():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    scores = score_tokens(model, rows(4)[0][None], torch.tensor([[False, True, False, True]]))
    assert scores.loss.isnan().all()


@pytest.mark.parametrize(
    ("trainable", "mask", "positions", "said"),
    [
        ([[1, 1, 1, 1]], None, None, "row 0, position 0 is the first token"),
        ([[0, 1, 1, 1]], [[0, 1, 1, 1]], None, "position 1 is the first token"),
        ([[0, 1, 1, 1]], [[1, 1, 1, 0]], None, "position 3 is padding"),
        ([[0, 1, 1, 1]], None, [[0, 1, 0, 1]], "position 2 is the first token"),
        ([[0, 1, 1]], None, None, "expected `trainable` \\(1, 4\\)"),
    ],
)
def test_targets_that_nothing_predicts_are_refused(trainable, mask, positions, said):
    as_tensor = lambda value: None if value is None else torch.tensor(value)  # noqa: E731
    with pytest.raises(InputError, match=said):
        score_tokens(
            tiny_model("llama"),
            rows(4)[0][None],
            torch.tensor(trainable).bool(),
            attention_mask=as_tensor(mask),
            position_ids=as_tensor(positions),
        )


@pytest.mark.parametrize("bad", [VOCABULARY, -1])
def test_an_id_outside_the_vocabulary_is_named(bad):
    ids = rows(4)[0][None]
    ids[0, 2] = bad
    with pytest.raises(InputError, match=f"found {bad} at row 0, position 2"):
        score_tokens(tiny_model("llama"), ids, torch.tensor([[False, True, False, False]]))


def test_heads_that_cannot_be_read_are_refused():
    ids, targets = rows(4)[0][None], torch.tensor([[False, True, True, True]])
    model = tiny_model("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ModelError, match="linear output layer.*found Sequential"):
        score_tokens(model, ids, targets)
    model = tiny_model("llama")
    plain = model.forward
    model.forward = lambda **given: _doubled(plain(**given))
    with pytest.raises(ModelError, match="computes others"):
        score_tokens(model, ids, targets)
    model = tiny_model("llama")
    plain_norm = model.model.forward
    model.forward = lambda **given: _other_hidden(model, plain_norm(**given))
    with pytest.raises(ModelError, match="computes others"):
        score_tokens(model, ids, targets)
    config = T5Config(vocab_size=VOCABULARY, d_model=16, num_layers=1, d_kv=4, d_ff=8, num_heads=2)
    with pytest.raises(ModelError, match="causal language model"):
        score_tokens(T5ForConditionalGeneration(config), ids, targets)


def _doubled(made):
    made.logits = made.logits * 2
    return made


def _other_hidden(model, made):
    logits = model.lm_head(made.last_hidden_state * 1.1)
    return CausalLMOutput(logits=logits)


def test_a_head_that_was_wrapped_for_mixed_precision_is_read():
    model = tiny_model("gemma2")
    (row,) = rows(6)
    exact = truth(model, row)[0]
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    scores = score_tokens(model, row[None], torch.arange(6)[None] > 0)
    np.testing.assert_allclose(scores.loss, exact, atol=3e-5)


def test_a_state_space_model_has_losses_and_no_attention():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    (row,) = rows(6)
    targets = torch.arange(6)[None] > 0
    scores = score_tokens(model, row[None], targets)
    np.testing.assert_allclose(scores.loss, truth(model, row)[0], atol=3e-5)
    with pytest.raises(ModelError, match=r"layers\.1 .*MambaMixer"):
        score_tokens(model, row[None], targets, attention=PromptAttention())


def test_lora_adapters_and_their_absence():
    peft = pytest.importorskip("peft")
    base = tiny_model("llama")
    (row,) = rows(7)
    targets = torch.arange(7)[None] > 0
    before = score_tokens(base, row[None], targets).loss
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    model.eval()
    adapted = score_tokens(model, row[None], targets, attention=PromptAttention())
    np.testing.assert_allclose(adapted.loss, truth(model, row)[0], atol=3e-5)
    assert (adapted.loss - before).abs().max() > 1e-2
    with model.disable_adapter():
        torch.testing.assert_close(score_tokens(model, row[None], targets).loss, before)


def test_an_output_layer_that_peft_trains_whole():
    peft = pytest.importorskip("peft")
    base = tiny_model("llama")
    (row,) = rows(7)
    targets = torch.arange(7)[None] > 0
    before = score_tokens(base, row[None], targets).loss
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["lm_head"])
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.mul_(1.5)
    model.eval()
    trained = score_tokens(model, row[None], targets).loss
    np.testing.assert_allclose(trained, truth(model, row)[0], atol=5e-5)
    assert (trained - before).abs().max() > 1e-2
    with model.disable_adapter():
        torch.testing.assert_close(score_tokens(model, row[None], targets).loss, before)


def test_an_answer_alone_follows_the_start_token():
    ids = np.array([9, 4, 5, 6, 9, 7, 8])
    trainable = np.array([0, 0, 1, 1, 0, 1, 1], bool)
    turn = np.array([0, 0, 1, 1, 2, 3, 3])
    made = answer_alone(ids, trainable, turn, 1)
    assert [row.tolist() for row in made] == [[1, 5, 6], [1, 7, 8]]
    assert all(row.dtype == np.int64 for row in made)
    assert answer_alone(ids, np.zeros(7, bool), turn, 1) == []
