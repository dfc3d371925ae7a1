"""The words of a prompt: every entry of a tokenizer or file, with one reason each."""

import gzip
import json
import unicodedata
from collections import Counter

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prunery.errors import InputError, ModelError, RecipeError
from prunery.pipelines.prompts.tables import VOCABULARY
from prunery.pipelines.prompts.vocabulary import (
    Entry,
    WordFilter,
    file_entries,
    tokenizer_entries,
    vocabulary_rows,
)
from prunery.storage import Store, row_id

from ...tiny_models import packaged_tokenizer
from .prompt_rows import plain_rows, rows_of, run_step, text_set

PUBLISHED = WordFilter(letters_only=False, least_characters=1)


def fast(model, decoder=None, pre=None, **special):
    tokenizer = Tokenizer(model)
    if decoder is not None:
        tokenizer.decoder = decoder
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def unigram(*tokens):
    entries = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((token, -1.0) for token in tokens)]
    return fast(
        models.Unigram(entries, unk_id=2),
        decoders.Metaspace(),
        pre_tokenizers.Metaspace(),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def byte_level(*tokens):
    vocab = {token: number for number, token in enumerate(["<|end|>", *tokens])}
    return fast(
        models.BPE(vocab, []),
        decoders.ByteLevel(),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        eos_token="<|end|>",
    )


def wordpiece(*tokens):
    vocab = {token: number for number, token in enumerate(["[UNK]", *tokens])}
    return fast(models.WordPiece(vocab, unk_token="[UNK]"), decoders.WordPiece(), unk_token="[UNK]")


def rows(tokenizer, wanted=None, *, word_start=True):
    entries = tokenizer_entries(tokenizer, word_start=word_start)
    return vocabulary_rows(entries, wanted or WordFilter())


def seen(made):
    return [(row["token"], row["text"], row["reason"]) for row in made]


# -- tokenizers ----------------------------------------------------------------------------------


def test_sentencepiece():
    made = rows(unigram("▁", "▁post", "ing", "▁6.", "▁a", "▁încerc", "▁po st"))
    assert seen(made) == [
        ("<pad>", "<pad>", "special"),
        ("</s>", "</s>", "special"),
        ("<unk>", "<unk>", "special"),
        ("▁", "", "empty"),
        ("▁post", "post", "word"),
        ("ing", "ing", "not_word_start"),
        ("▁6.", "6.", "not_letters"),
        ("▁a", "a", "too_short"),
        ("▁încerc", "încerc", "word"),
        ("▁po st", "po st", "word"),
    ]
    assert [row["token_id"] for row in made] == list(range(10))
    assert [row["keep"] for row in made] == [row["reason"] == "word" for row in made]


def test_a_tokenizer_without_a_decoder_has_words_too():
    bare = unigram("▁post", "ing", "▁6.")
    bare.backend_tokenizer.decoder = None
    assert [(row["token"], row["text"]) for row in rows(bare) if row["keep"]] == [("▁post", "post")]


def test_byte_level_bpe():
    made = rows(byte_level("Ġthe", "the", "ĠcafÃ©", "ĠÃ", "Ġ", "ĊĊ", "ĠThe"))
    assert seen(made)[1:] == [
        ("Ġthe", "the", "word"),
        ("the", "the", "not_word_start"),
        ("ĠcafÃ©", "café", "word"),
        ("ĠÃ", "\ufffd", "undecodable"),
        ("Ġ", "", "empty"),
        ("ĊĊ", "", "not_word_start"),
        ("ĠThe", "The", "word"),
    ]
    loose = rows(byte_level("Ġthe", "the", "Ġa\u0120b"), PUBLISHED, word_start=False)
    assert [row["reason"] for row in loose] == ["special", "word", "duplicate", "word"]


def test_wordpiece():
    made = rows(wordpiece("[unused7]", "run", "##ning", "##", "#tag"))
    assert seen(made) == [
        ("[UNK]", "[UNK]", "special"),
        ("[unused7]", "[unused7]", "special"),
        ("run", "run", "word"),
        ("##ning", "ning", "not_word_start"),
        ("##", "", "not_word_start"),
        ("#tag", "#tag", "not_letters"),
    ]
    loose = rows(wordpiece("run", "##run", "##ning"), word_start=False)
    assert [row["reason"] for row in loose] == ["special", "word", "duplicate", "word"]
    assert [row["text"] for row in loose if row["keep"]] == ["run", "ning"]


def test_added_tokens_are_no_words_and_special_ones_are_special():
    tokenizer = wordpiece("run")
    tokenizer.add_tokens(["walk"])
    tokenizer.add_tokens([AddedToken("<tool>", special=True)], special_tokens=True)
    assert [row["reason"] for row in rows(tokenizer)] == ["special", "word", "added", "special"]


def test_a_tokenizer_without_marks_is_refused_or_taken_whole():
    tokenizer = fast(models.BPE({"a": 0, "lo</w>": 1}, [], end_of_word_suffix="</w>"))
    with pytest.raises(InputError, match="expected marks where words start"):
        rows(tokenizer)
    words = fast(models.WordLevel({"[UNK]": 0, "sun": 1, "moon": 2}, unk_token="[UNK]"))
    assert [row["text"] for row in rows(words) if row["keep"]] == ["sun", "moon"]


def test_the_packaged_vocabulary():
    made = rows(packaged_tokenizer())
    assert len(made) == 30522
    assert len({row["id"] for row in made}) == len(made)
    kept = [row["text"] for row in made if row["keep"]]
    assert len(set(kept)) == len(kept) and len(kept) > 20_000
    assert kept[:3] == ["the", "of", "and"]
    found = Counter(row["reason"] for row in made)
    assert found["special"] == 5 + 994
    names = [row["token"] for row in made]
    assert found["not_word_start"] == sum(name.startswith("##") for name in names)
    for row in made:
        if row["reason"] == "not_letters":
            assert not row["text"].isalpha()
        if row["reason"] == "too_short":
            assert len(row["text"]) == 1 and row["text"].isalpha()


def test_the_published_words_pass_the_published_filter(shared_data):
    """What ClaPS ships was filtered by its rule: all of it starts words here too."""
    folder = shared_data / "prompt_claps_vocab"
    if not folder.is_dir():
        pytest.skip("prompt_claps_vocab is not among the real data sets")
    for size, count in (("base", 1867), ("large", 1905)):
        path = folder / f"google-flan-t5-{size}-kmeans-vocab.json"
        tokens = sorted(json.loads(path.read_text()))
        assert len(tokens) == count
        made = rows(unigram(*tokens), PUBLISHED)[3:]
        assert [row["token"] for row in made] == tokens
        reasons = Counter(row["reason"] for row in made)
        # A bare mark stands for no text at all.
        assert {row["token"] for row in made if row["reason"] == "empty"} <= {"▁"}
        assert reasons["not_word_start"] == 0
        assert reasons["word"] >= count - 1


def test_gpt2s_words_are_the_tokens_that_they_came_from(shared_data):
    """Inside of a sentence the text of every kept entry is that very token."""
    folder = shared_data / "tok_real"
    if not folder.is_dir():
        pytest.skip("tok_real is not among the real data sets")
    vocab = json.loads(gzip.decompress((folder / "gpt2-vocab.json.gz").read_bytes()))
    lines = gzip.decompress((folder / "gpt2-merges.txt.gz").read_bytes()).decode().splitlines()
    merges = [tuple(line.split()) for line in lines[1:] if line]
    # The stored vocabulary lacks one token that a merge makes.
    merges = [merge for merge in merges if "".join(merge) in vocab]
    tokenizer = fast(
        models.BPE(vocab, merges),
        decoders.ByteLevel(),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        eos_token="<|endoftext|>",
    )
    made = rows(tokenizer, PUBLISHED)
    kept = [row for row in made if row["keep"]]
    assert len(kept) > 33_000
    pieces = tokenizer([f" {row['text']}" for row in kept])["input_ids"]
    assert pieces == [[row["token_id"]] for row in kept]
    starts = sum(token.startswith("Ġ") for token in vocab)
    reasons = Counter(row["reason"] for row in made)
    assert starts == len(kept) + reasons["undecodable"] + reasons["empty"] + reasons["control"]


# -- filters -------------------------------------------------------------------------------------


def entries(*texts):
    return [Entry(text, number, text) for number, text in enumerate(texts)]


def test_each_filter_alone():
    texts = ["a", "ab", "a1", "two words", "two w0rds", "zero\u200bwidth", "x\ny", "", "日本"]
    loose = {"letters_only": False, "least_characters": 1}

    def reasons(**options):
        made = vocabulary_rows(entries(*texts), WordFilter(**{**loose, **options}))
        return {row["text"]: row["reason"] for row in made if not row["keep"]}

    unseen = {"zero\u200bwidth": "control", "x\ny": "control", "": "empty"}
    assert reasons() == unseen
    assert reasons(letters_only=True) == unseen | {"a1": "not_letters", "two w0rds": "not_letters"}
    assert reasons(least_characters=3) == unseen | dict.fromkeys(
        ["a", "ab", "a1", "日本"], "too_short"
    )
    kept = {text for text in texts if len(text) == 2 and text.isascii()}
    others = {text for text in texts if text not in kept | set(unseen)}
    assert reasons(pattern="[a-z0-9]{2}") == unseen | dict.fromkeys(others, "no_match")
    for text in unseen.keys() - {""}:
        assert any(unicodedata.category(c) in ("Cf", "Cc") for c in text)


def test_most_keeps_the_first_fit_ones():
    made = vocabulary_rows(entries("a", "be", "be", "see", "x", "dee"), WordFilter(most=2))
    assert [row["reason"] for row in made] == [
        "too_short", "word", "duplicate", "word", "too_short", "too_many",
    ]  # fmt: skip


def test_ids_are_of_the_word_where_it_is_kept():
    one = vocabulary_rows(entries("sun", "sun", "moon"), WordFilter())
    two = vocabulary_rows(entries("moon", "1", "sun"), WordFilter())
    assert one[0]["id"] == two[2]["id"] == row_id("prompt_word", "sun")
    assert one[1]["id"] == row_id("prompt_word", "sun", 1)
    assert len({row["id"] for row in one}) == 3


def test_nothing_left_counts_the_reasons():
    with pytest.raises(InputError, match=r"none among 3 entries \(2 too_short, 1 not_letters\)"):
        vocabulary_rows(entries("a", "b", "c3"), WordFilter())
    with pytest.raises(InputError, match="none among 0 entries"):
        vocabulary_rows([], WordFilter())


def test_a_file_of_words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_bytes("\ufeffsun\r\n  two   words \n\nsun\nsci-fi\n".encode())
    made = vocabulary_rows(file_entries(path), PUBLISHED)
    assert [(row["text"], row["reason"]) for row in made] == [
        ("sun", "word"),
        ("two words", "word"),
        ("", "empty"),
        ("sun", "duplicate"),
        ("sci-fi", "word"),
    ]
    assert {row["token_id"] for row in made} == {-1}
    path.write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(InputError, match=r"words.txt, line 2: expected UTF-8"):
        list(file_entries(path))
    with pytest.raises(InputError, match="expected a file with a word a line"):
        list(file_entries(tmp_path / "none.txt"))


# -- the step ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with a task; its tests add tables under names that they alone read."""
    made = Store(tmp_path_factory.mktemp("vocabulary"))
    text_set(made, plain_rows())
    run_step(made, "prompt_task", {"data": "data"}, shots=2, validation_shots=2)
    return made


def vocabulary(store, **options):
    return run_step(store, "prompt_vocabulary", {"task": "prompt_task"}, **options)


def test_the_step_writes_every_entry(store):
    manifest = vocabulary(store, most=500)
    table = store.table("prompt_vocabulary").to_table()
    assert table.schema.equals(VOCABULARY)
    made = table.to_pylist()
    assert made == rows(packaged_tokenizer(), WordFilter(most=500))
    assert manifest.kept == 500 and manifest.kept + sum(manifest.dropped.values()) == 30522
    assert manifest.dropped == Counter(row["reason"] for row in made if not row["keep"])


def test_the_step_reads_another_tokenizer(store, tmp_path):
    folder = tmp_path / "tokenizer"
    unigram("▁sun", "▁moon", "s").save_pretrained(folder)
    manifest = vocabulary(store, source="tokenizer", tokenizer=str(folder))
    assert [row["text"] for row in rows_of(store, "prompt_vocabulary") if row["keep"]] == [
        "sun",
        "moon",
    ]
    unigram("▁sun", "▁stars", "s").save_pretrained(folder)
    other = vocabulary(store, source="tokenizer", tokenizer=str(folder))
    assert other.key != manifest.key
    with pytest.raises(ModelError):
        vocabulary(store, source="tokenizer", tokenizer=str(tmp_path))


def test_the_step_reads_a_file(store, tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("sun\nsci-fi\na\n")
    manifest = vocabulary(store, source="file", path=str(path))
    assert manifest.kept == 3
    copy = tmp_path / "copy.txt"
    copy.write_text(path.read_text())
    assert vocabulary(store, source="file", path=str(copy)).key == manifest.key
    assert vocabulary(store, source="file", path=str(path), letters_only=True).kept == 2
    path.write_text("sun\n")
    assert vocabulary(store, source="file", path=str(path)).key != manifest.key
    path.write_text("\n \n")
    with pytest.raises(InputError, match="2 empty"):
        vocabulary(store, source="file", path=str(path))


def test_an_endpoints_tokenizer_is_not_here(store):
    endpoint = {"black_box": "endpoint", "model": "some", "base_url": "http://127.0.0.1:9/v1"}
    task = {"shots": 2, "validation_shots": 2, **endpoint}
    run_step(store, "prompt_task", {"data": "data"}, name="far_task", **task)
    with pytest.raises(RecipeError, match="source: tokenizer"):
        run_step(store, "prompt_vocabulary", {"task": "far_task"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "file"}, "`path` belongs to `source: file`"),
        ({"path": "x"}, "`path` belongs to `source: file`"),
        ({"source": "tokenizer"}, "`tokenizer` belongs to `source: tokenizer`"),
        ({"pattern": "("}, "no regular expression"),
        ({"most": 0}, "greater than or equal to 1"),
    ],
)
def test_options_that_do_not_fit(store, options, message):
    with pytest.raises(ValueError, match=message):
        vocabulary(store, **options)
