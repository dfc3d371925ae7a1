"""Black boxes of causal, masked and sequence-to-sequence models against loops over full logits."""

import json

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BloomConfig, BloomForCausalLM

from prunery.errors import InputError, ModelError, RecipeError
from prunery.pruners.models import language
from prunery.pruners.models.language import load_language, resolve_language
from prunery.pruners.models.tokenizers import tokenizer_sha256
from prunery.pruners.signals import causal_labels, token_tree
from prunery.pruners.signals.black_box import BlackBox, Template
from prunery.pruners.signals.causal_labels import CausalLabels
from prunery.pruners.signals.language_labels import open_labels
from prunery.pruners.signals.masked_labels import MaskedLabels
from prunery.pruners.signals.seq2seq_labels import Seq2SeqLabels

from .label_models import model_of, tokenizer_of

ROWS = [
    "a bright and moving film, it was a great delight",
    "the plot was dull",
    "bad",
    "Prices rose by 12 percent in 2019, the bank said.\n",
    "it was what it was (please) ",
    "science! and more science; the review of the answer to the answer",
]
PROMPTS = [
    "",
    "good",
    "review answer",
    "review great",
    "(in one word)",
    "classify the review ",
    "x",
]
WORDS = ["great", "terrible", "it was bad"]
TEMPLATES = [
    "{text} {prompt}",
    "{text} Mood: {prompt} It was",
    "{prompt} {text}",
    "Say what you think. It was good or bad. {prompt} Text: {text} It was",
    "{text}\n{prompt}\n",
    "{text}{prompt}",
]


def log_softmax(values):
    values = values - values.max(-1, keepdims=True)
    return values - np.log(np.exp(values).sum(-1, keepdims=True))


@torch.no_grad()
def naive_causal(model, tokenizer, template, words, first, prompts, rows):
    """One (prompt, row, class) at a time, by full logits."""
    made = np.zeros((len(prompts), len(rows), len(words)))
    counts = np.zeros(made.shape[:2], int)
    sample = template.render(prompt="x", text="x")
    space = "" if sample[-1].isspace() else " "
    for p, prompt in enumerate(prompts):
        for n, row in enumerate(rows):
            ids = tokenizer(template.render(prompt=prompt, text=row))["input_ids"]
            counts[p, n] = len(ids)
            for c, word in enumerate(words):
                start = tokenizer(sample)["input_ids"]
                more = tokenizer(sample + space + word)["input_ids"][len(start) :]
                more = more[:1] if first else more
                counts[p, n] += len(more) - 1
                logits = model(torch.tensor([ids + more])).logits[0].double().numpy()
                if first:
                    made[p, n, c] = logits[len(ids) - 1, more[0]]
                else:
                    steps = log_softmax(logits)[len(ids) - 1 :]
                    made[p, n, c] = sum(steps[at, token] for at, token in enumerate(more))
    return log_softmax(made), counts


def close(found, wanted):
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-4)


CASES = [(name, source, False) for name in ("llama", "gpt2") for source in TEMPLATES]
CASES += [("qwen2", TEMPLATES[1], False), ("qwen2", TEMPLATES[2], False)]
CASES += [(name, TEMPLATES[place], True) for name in ("llama", "gpt2") for place in (0, 3)]


@pytest.mark.parametrize(("name", "source", "first"), CASES)
def test_causal_equals_the_loop(name, source, first):
    model, tokenizer = model_of(name)
    template = Template(source)
    words = WORDS[:2] if first else WORDS
    box = CausalLabels(
        model, tokenizer, words, template=template, label_tokens="first" if first else "all"
    )
    assert isinstance(box, BlackBox)
    wanted, counts = naive_causal(model, tokenizer, template, words, first, PROMPTS, ROWS)
    found = box.label_logprobs(PROMPTS, ROWS)
    close(found, wanted)
    assert box.input_tokens(PROMPTS, ROWS).tolist() == counts.tolist()
    assert box.input_tokens(PROMPTS, ROWS).dtype == np.int64
    # Another question of the same box, whose texts are already read, and one pair alone.
    close(box.label_logprobs(PROMPTS[:0:-1], ROWS), wanted[:0:-1])
    close(box.label_logprobs(PROMPTS[2:3], ROWS[3:4]), wanted[2:3, 3:4])


@pytest.mark.parametrize("size", [1, 60])
def test_batches_and_trees_of_any_size_give_the_same(size, monkeypatch):
    model, tokenizer = model_of("llama")
    template = Template(TEMPLATES[0])
    wanted, _ = naive_causal(model, tokenizer, template, WORDS, False, PROMPTS, ROWS)
    monkeypatch.setattr(causal_labels, "_NODES", max(4, size // 5))
    monkeypatch.setattr(causal_labels, "_RUN", 1)
    box = CausalLabels(model, tokenizer, WORDS, template=template, batch_tokens=size)
    for _ in range(2):
        close(box.label_logprobs(PROMPTS, ROWS), wanted)


def test_padding_side_changes_nothing():
    model, tokenizer = model_of("gpt2")
    other = tokenizer_of("gpt2")
    other.padding_side = "left"
    template = Template(TEMPLATES[0])
    boxes = [CausalLabels(model, t, WORDS, template=template) for t in (tokenizer, other)]
    first, second = (box.label_logprobs(PROMPTS, ROWS) for box in boxes)
    np.testing.assert_array_equal(first, second)


def count_tokens(model, monkeypatch):
    """Tokens that the decoder is run on from now on."""
    read = []
    decoder = token_tree.decoder_of(model)
    kept = decoder.forward

    def forward(*args, **given):
        read.append(given["input_ids"].numel())
        return kept(*args, **given)

    monkeypatch.setattr(decoder, "forward", forward)
    return read


def test_texts_are_read_once_and_prompts_share_what_they_begin_with(monkeypatch):
    model, tokenizer = model_of("llama")
    box = CausalLabels(model, tokenizer, WORDS[:2], template=Template("{text} {prompt}"))
    rows = ["a bright and moving film, it was a great delight from start to end"] * 2
    rows[1] += " it was"
    prompts = [f"good bad great {word}" for word in ("film", "review", "answer", "world")]
    box.label_logprobs(prompts, rows)  # what is tried once a model is behind us
    read = count_tokens(model, monkeypatch)
    box._kept.clear()
    box.label_logprobs(prompts, rows)
    texts = [len(tokenizer(row)["input_ids"]) for row in rows]
    tails = [box._texts(prompts, rows).right[place] for place in range(4)]
    nodes = {tail[: size + 1] for tail in tails for size in range(len(tail))}
    endings = sum(len(ids) - 1 for ids in box._words)
    assert read == [2 * (max(texts) - 1), 2 * (1 + len(nodes) + 4 * endings)]
    box.label_logprobs(prompts[:3], rows)
    assert len(read) == 3  # the texts are known


def test_a_model_without_trees_is_read_plainly():
    torch.manual_seed(0)
    tokenizer = tokenizer_of("gpt2")
    model = BloomForCausalLM(
        BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4)
    ).eval()
    with torch.no_grad():
        for part in model.parameters():
            if part.ndim > 1:
                part.normal_(0, 0.15)
    assert not token_tree.fits(model)
    assert token_tree.fits(model_of("gpt2")[0])
    template = Template(TEMPLATES[0])
    box = CausalLabels(model, tokenizer, WORDS, template=template)
    wanted, _ = naive_causal(model, tokenizer, template, WORDS, False, PROMPTS, ROWS)
    close(box.label_logprobs(PROMPTS, ROWS), wanted)


@torch.no_grad()
def naive_masked(model, tokenizer, template, words, first, prompts, rows):
    made = np.zeros((len(prompts), len(rows), len(words)))
    counts = np.zeros(made.shape[:2], int)
    mask = tokenizer.mask_token
    for p, prompt in enumerate(prompts):
        for n, row in enumerate(rows):
            seen = set()
            for c, word in enumerate(words):
                sample = tokenizer(template.render(prompt="x", text="x", mask=mask))["input_ids"]
                filled = tokenizer(template.render(prompt="x", text="x", mask=word))["input_ids"]
                at = sample.index(tokenizer.mask_token_id)
                tokens = filled[at : len(filled) - (len(sample) - at - 1)]
                tokens = tokens[:1] if first else tokens
                text = template.render(prompt=prompt, text=row, mask=mask * len(tokens))
                ids = tokenizer(text)["input_ids"]
                if len(tokens) not in seen:
                    counts[p, n] += len(ids)
                seen.add(len(tokens))
                logits = model(torch.tensor([ids])).logits[0].double().numpy()
                at = ids.index(tokenizer.mask_token_id)
                if first:
                    made[p, n, c] = logits[at, tokens[0]]
                else:
                    steps = log_softmax(logits)
                    made[p, n, c] = sum(steps[at + i, t] for i, t in enumerate(tokens))
    return log_softmax(made), counts


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("source", ["{text} {prompt} {mask} .", "{mask} : {prompt} {text}"])
def test_masked_equals_the_loop(name, source, first):
    model, tokenizer = model_of(name)
    template = Template(source)
    words = WORDS[:2] if first else WORDS
    mode = "first" if first else "all"
    box = MaskedLabels(
        model, tokenizer, words, template=template, label_tokens=mode, batch_tokens=150
    )
    assert isinstance(box, BlackBox)
    wanted, counts = naive_masked(model, tokenizer, template, words, first, PROMPTS, ROWS)
    close(box.label_logprobs(PROMPTS, ROWS), wanted)
    assert box.input_tokens(PROMPTS, ROWS).tolist() == counts.tolist()


def test_the_head_of_a_masked_model_sees_masks_alone():
    model, tokenizer = model_of("bert")
    box = MaskedLabels(
        model, tokenizer, ["good", "bad"], template=Template("{text} {prompt} {mask}")
    )
    seen = []
    hook = model.cls.register_forward_hook(lambda _, given, __: seen.append(given[0].shape))
    box.label_logprobs(PROMPTS, ROWS)
    hook.remove()
    assert seen
    assert all(shape[1] == 1 for shape in seen)
    assert sum(shape[0] for shape in seen) == len(PROMPTS) * len(ROWS) * len(box._sizes)
    assert not model.base_model._forward_hooks


@torch.no_grad()
def naive_seq2seq(model, tokenizer, template, words, first, prompts, rows, start):
    made = np.zeros((len(prompts), len(rows), len(words)))
    for p, prompt in enumerate(prompts):
        for n, row in enumerate(rows):
            ids = tokenizer(template.render(prompt=prompt, text=row))["input_ids"]
            for c, word in enumerate(words):
                tokens = tokenizer(word, add_special_tokens=False)["input_ids"]
                tokens = tokens[:1] if first else tokens
                logits = model(
                    input_ids=torch.tensor([ids]),
                    decoder_input_ids=torch.tensor([[*start, *tokens[:-1]]]),
                ).logits[0]
                steps = log_softmax(logits.double().numpy())[len(start) - 1 :]
                made[p, n, c] = sum(steps[at, token] for at, token in enumerate(tokens))
    return log_softmax(made)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("name", "start"), [("t5", [0]), ("bart", [2, 0])])
@pytest.mark.parametrize("source", ["{prompt} {text}", "{text} {prompt}"])
def test_seq2seq_equals_the_loop(name, start, source, first):
    model, tokenizer = model_of(name)
    template = Template(source)
    words = ["great", "bad"] if first and name == "bart" else WORDS
    words = ["it", "bad"] if first and name == "t5" else words
    if first:
        firsts = tokenizer(words, add_special_tokens=False)["input_ids"]
        assert len({ids[0] for ids in firsts}) == 2
    box = Seq2SeqLabels(
        model,
        tokenizer,
        words,
        template=template,
        label_tokens="first" if first else "all",
        batch_tokens=150,
    )
    assert isinstance(box, BlackBox)
    wanted = naive_seq2seq(model, tokenizer, template, words, first, PROMPTS[:4], ROWS, start)
    close(box.label_logprobs(PROMPTS[:4], ROWS), wanted)
    words_read = sum(len(ids) - 1 for ids in box._words)
    counts = box.input_tokens(PROMPTS, ROWS)
    for p, prompt in enumerate(PROMPTS):
        for n, row in enumerate(ROWS):
            size = len(tokenizer(template.render(prompt=prompt, text=row))["input_ids"])
            assert counts[p, n] == size + words_read


def test_blocks_of_logits_do_not_change_answers(monkeypatch):
    model, tokenizer = model_of("t5")
    box = Seq2SeqLabels(model, tokenizer, WORDS, template=Template("{prompt} {text}"))
    whole = box.label_logprobs(PROMPTS, ROWS)
    monkeypatch.setattr("prunery.pruners.signals.seq2seq_labels._LOGITS", 1)
    close(box.label_logprobs(PROMPTS, ROWS), whole)


KINDS = [
    (CausalLabels, "llama", "{text} {prompt}"),
    (MaskedLabels, "bert", "{text} {prompt} {mask}"),
    (Seq2SeqLabels, "bart", "{prompt} {text}"),
]


@pytest.mark.parametrize(("kind", "name", "source"), KINDS)
def test_nothing_asked_one_asked_and_bad_input(kind, name, source):
    model, tokenizer = model_of(name)
    box = kind(model, tokenizer, ["good", "bad"], template=Template(source))
    assert box.classes == 2
    assert box.label_logprobs([], ROWS).shape == (0, len(ROWS), 2)
    assert box.label_logprobs(PROMPTS, []).shape == (len(PROMPTS), 0, 2)
    assert box.input_tokens([], ROWS).shape == (0, len(ROWS))
    one = box.label_logprobs(["good"], [ROWS[0]])
    np.testing.assert_allclose(np.exp(one).sum(-1), 1, rtol=1e-6)
    empty = box.label_logprobs(["", "good"], ["", "bad"])  # an empty row has its special tokens
    assert np.isfinite(empty).all()
    with pytest.raises(InputError, match="at least 2 classes"):
        kind(model, tokenizer, ["good"], template=Template(source))
    with pytest.raises(RecipeError, match=r"\{prompt\}|\{text\}"):
        kind(model, tokenizer, ["good", "bad"], template=Template("{text} {mask}"))
    with pytest.raises(RecipeError, match="'good' and 'good' share the tokens"):
        kind(model, tokenizer, ["good", "good"], template=Template(source))
    with pytest.raises(InputError, match="batch_tokens"):
        kind(model, tokenizer, ["good", "bad"], template=Template(source), batch_tokens=0)
    with pytest.raises(InputError, match="label_tokens"):
        kind(model, tokenizer, ["a", "b"], template=Template(source), label_tokens="last")


def test_words_with_one_first_token_are_refused_by_name():
    model, tokenizer = model_of("gpt2")
    words = ["great deal", "terrible", "great delight"]
    box = CausalLabels(model, tokenizer, words, template=Template("{text} {prompt}"))
    assert box.classes == 3
    with pytest.raises(RecipeError, match=r"'great deal' and 'great delight' share the first"):
        CausalLabels(
            model,
            tokenizer,
            words,
            template=Template("{text} {prompt}"),
            label_tokens="first",
        )


def test_words_that_the_vocabulary_lacks_or_that_do_not_fit_are_refused():
    bert, tokenizer = model_of("bert")
    with pytest.raises(RecipeError, match="lacks the word '☃'"):
        MaskedLabels(bert, tokenizer, ["good", "☃"], template=Template("{text} {prompt} {mask}"))
    gpt2, other = model_of("gpt2")
    with pytest.raises(RecipeError, match="white space off its end"):
        CausalLabels(gpt2, other, ["good", "bad"], template=Template("{text} {prompt} so: "))
    with pytest.raises(ModelError, match="mask token"):
        MaskedLabels(gpt2, other, ["good", "bad"], template=Template("{text} {prompt} {mask}"))
    roberta, bytes_ = model_of("roberta")
    with pytest.raises(RecipeError, match=r"Put spaces around \{mask\}"):
        MaskedLabels(roberta, bytes_, ["grea", "b"], template=Template("{text} {prompt} {mask}t"))
    box = MaskedLabels(
        bert, tokenizer, ["good", "bad"], template=Template("{text} {prompt} {mask}")
    )
    with pytest.raises(InputError, match=r"row 1 .*found 2"):
        box.label_logprobs(["x"], ["good", "a [MASK] of it"])


def test_a_text_of_no_tokens_is_refused():
    model, tokenizer = model_of("gpt2")
    box = CausalLabels(model, tokenizer, ["good", "bad"], template=Template("{text} {prompt}"))
    with pytest.raises(InputError, match="row 1 with prompt 0 has no tokens"):
        box.label_logprobs(["", "x"], ["good", ""])


@pytest.mark.parametrize(
    ("kind", "name", "source", "limit"),
    [
        (CausalLabels, "gpt2", "{text} {prompt}", 128),
        (MaskedLabels, "roberta", "{text} {prompt} {mask}", 128),
        (Seq2SeqLabels, "bart", "{prompt} {text}", 128),
    ],
)
def test_texts_beyond_the_window_are_refused_by_name(kind, name, source, limit):
    model, tokenizer = model_of(name)
    box = kind(model, tokenizer, ["film", "bad"], template=Template(source), label_tokens="first")
    word = " film"
    count = 0
    while box.input_tokens(["x"], [(word * (count + 1)).strip()])[0, 0] <= limit:
        count += 1
    fits = (word * count).strip()
    assert np.isfinite(box.label_logprobs(["x"], ["bad", fits])).all()
    with pytest.raises(InputError, match=rf"row 1 .* tokens long; the model reads {limit}"):
        box.label_logprobs(["x"], ["bad", fits + word])


def test_half_precision_stays_near():
    model, tokenizer = model_of("llama")
    template = Template(TEMPLATES[0])
    box = CausalLabels(model, tokenizer, WORDS, template=template)
    wanted = box.label_logprobs(PROMPTS, ROWS)
    try:
        model.bfloat16()
        box = CausalLabels(model, tokenizer, WORDS, template=template)
        found = box.label_logprobs(PROMPTS, ROWS)
    finally:
        model.float()
        model_of.cache_clear()
    assert np.abs(found - wanted).max() < 0.3


# -- folders -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for head, name in (("causal", "llama"), ("masked", "bert"), ("seq2seq", "t5")):
        made[head] = tmp_path_factory.mktemp(head)
        model, tokenizer = model_of(name)
        model.save_pretrained(made[head])
        tokenizer.save_pretrained(made[head])
    return made


@pytest.mark.parametrize("head", ["causal", "masked", "seq2seq"])
def test_open_labels_reads_a_folder_once(folders, head, monkeypatch):
    folder = str(folders[head])
    found, loaded = resolve_language(folder, head), load_language(folder, head, "cpu", "float32")
    assert (found.path, found.sha256) == (loaded.path, loaded.digest)
    assert found.tokenizer_sha256 == loaded.tokenizer_sha256
    name = {"causal": "llama", "masked": "bert", "seq2seq": "t5"}[head]
    kind = {"causal": CausalLabels, "masked": MaskedLabels, "seq2seq": Seq2SeqLabels}[head]
    template = Template("{text} {prompt} {mask}" if head == "masked" else "{text} {prompt}")
    language.kept_language.cache_clear()
    box = open_labels(head, folder, WORDS, template, device="cpu", batch_tokens=200)
    again = open_labels(head, folder, WORDS, template, device="cpu", label_tokens="all")
    assert isinstance(box, kind)
    assert box._model is again._model
    model, tokenizer = model_of(name)
    same = kind(model, tokenizer, WORDS, template=template)
    close(box.label_logprobs(PROMPTS, ROWS), same.label_logprobs(PROMPTS, ROWS))
    language.kept_language.cache_clear()


def test_what_is_not_of_that_kind_is_refused(folders, tmp_path):
    with pytest.raises(ModelError, match="masked language model"):
        load_language(str(folders["causal"]), "masked", "cpu")
    with pytest.raises(ModelError, match="causal, masked, seq2seq; found 'other'"):
        resolve_language(str(folders["causal"]), "other")
    with pytest.raises(InputError, match="causal, masked, seq2seq; found 'other'"):
        open_labels("other", str(folders["causal"]), WORDS, Template("{text} {prompt}"))
    torch.manual_seed(0)
    tokenizer = tokenizer_of("bert")
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    BertForMaskedLM(config).bert.save_pretrained(tmp_path)  # an encoder without its head
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"masked language model .*cls\.predictions"):
        load_language(str(tmp_path), "masked", "cpu")


def test_the_tokenizers_digest_sees_its_special_tokens(folders):
    tokenizer = tokenizer_of("llama")
    plain = tokenizer_of("llama")
    state = json.loads(plain.backend_tokenizer.to_str()) | {"post_processor": None}
    plain._tokenizer = type(plain.backend_tokenizer).from_str(json.dumps(state))
    assert plain("x")["input_ids"] == tokenizer("x")["input_ids"][1:]
    kept, cut = (tokenizer_sha256(one, marks=True) for one in (tokenizer, plain))
    assert kept != cut
    assert tokenizer_sha256(tokenizer) == tokenizer_sha256(plain)  # of rendered chats
    assert resolve_language(str(folders["causal"]), "causal").tokenizer_sha256 == kept


def test_the_digest_of_seq2seq_sees_what_an_answer_starts_with(tmp_path):
    model, tokenizer = model_of("bart")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    before = resolve_language(str(tmp_path), "seq2seq").sha256
    assert Seq2SeqLabels(
        load_language(str(tmp_path), "seq2seq", "cpu").model,
        tokenizer,
        ["great", "bad"],
        template=Template("{prompt} {text}"),
    )._start == (2, 0)
    file = tmp_path / "generation_config.json"
    file.write_text(
        file.read_text().replace('"forced_bos_token_id": 0', '"forced_bos_token_id": 3')
    )
    assert resolve_language(str(tmp_path), "seq2seq").sha256 != before


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("gpt2", ["Ġgreat", "Ġterrible"]),
        ("llama", ["▁great", "▁terrible"]),
        ("roberta", ["Ġgreat", "Ġterrible"]),
        ("bert", ["great", "terrible"]),
    ],
)
def test_words_carry_the_mark_of_a_words_start(name, pieces):
    model, tokenizer = model_of(name)
    kind = MaskedLabels if name in ("bert", "roberta") else CausalLabels
    source = "{text} {prompt} {mask} ." if kind is MaskedLabels else "{text} {prompt}"
    box = kind(model, tokenizer, ["great", "terrible"], template=Template(source))
    assert [tokenizer.convert_ids_to_tokens(list(ids)) for ids in box._words] == [
        [piece] for piece in pieces
    ]


def test_words_behind_a_line_break_carry_none():
    model, tokenizer = model_of("gpt2")
    box = CausalLabels(model, tokenizer, ["good", "bad"], template=Template("{text} {prompt}\n"))
    assert [tokenizer.decode(list(ids)) for ids in box._words] == ["good", "bad"]


@pytest.mark.parametrize(("kind", "name", "source"), KINDS)
def test_numbers_that_are_not_finite_are_an_error(kind, name, source):
    model, tokenizer = model_of(name)
    box = kind(model, tokenizer, ["good", "bad"], template=Template(source))
    weight = model.get_input_embeddings().weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    try:
        with pytest.raises(ModelError, match="finite"):
            box.label_logprobs(["x"], ["bad"])
    finally:
        with torch.no_grad():
            weight.copy_(kept)
        model_of.cache_clear()
