"""Ids are the template's own; masks hold the answers and their end of turn, and nothing else."""

import datetime
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers, processors

from prunery.errors import InputError, ModelError
from prunery.pipelines import chats
from prunery.pipelines.chat_tokens import DEFAULT_TEMPLATE, ChatTokenizer
from prunery.pipelines.engine import StepContext
from prunery.pipelines.sft_tables import TOKENS
from prunery.pipelines.steps import STEPS
from prunery.pruners.models.tokenizers import template_sha256, tokenizer_sha256
from prunery.storage import Store

from ..chat_models import (
    CHATML,
    CHATML_MARKED,
    GEMMA,
    LLAMA,
    TEMPLATES,
    THINKING,
    chat_tokenizer,
)

every_template = pytest.mark.parametrize("name", TEMPLATES)

TALK = [
    {"role": "user", "content": "What does it do?"},
    {"role": "assistant", "content": "It returns the sum. \U0001f600"},
    {"role": "user", "content": "And what is it for?"},
    {"role": "assistant", "content": "Hello there!"},
]
TOOLS = [{"type": "function", "function": {"name": "add"}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
TOOL_TALK = [
    {"role": "system", "content": "Use the tool."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "It is 4."},
]


def tokenize(turns, template, *, tools=None, tokenizer=None, **options):
    """Tokens of OpenAI-style turns, read as `read_chats` reads them."""
    row = {"messages": turns} | ({"tools": tools} if tools else {})
    messages, tools_text = chats.parse(row, "messages")
    return ChatTokenizer(tokenizer or chat_tokenizer(template), **options)(messages, tools_text)


def pieces(tokens, mask):
    """Texts of each run of marked tokens."""
    tokenizer = chat_tokenizer()
    found, last = [], -2
    for place in np.flatnonzero(mask):
        if place != last + 1 or tokens.turn[place] != tokens.turn[last]:
            found.append([])
        found[-1].append(int(tokens.input_ids[place]))
        last = place
    return [tokenizer.decode(ids) for ids in found]


@every_template
@pytest.mark.parametrize("turns", [TALK, TALK[:2], TALK[:3]])
def test_ids_are_those_of_apply_chat_template(name, turns):
    tokens = tokenize(turns, TEMPLATES[name])
    wanted = chat_tokenizer(TEMPLATES[name]).apply_chat_template(turns)["input_ids"]
    assert tokens.input_ids.tolist() == wanted
    assert not tokens.truncated


@every_template
def test_answers_with_their_end_of_turn_are_trained_and_nothing_else(name):
    tokens = tokenize(TALK, TEMPLATES[name])
    assert pieces(tokens, tokens.trainable) == [
        "It returns the sum. \U0001f600<|im_end|>",
        "Hello there!<|im_end|>",
    ]
    assert pieces(tokens, tokens.protected) == ["<|im_end|>"] * 2
    assert (tokens.trainable | ~tokens.protected).all()


@every_template
def test_turns_are_the_numbers_of_the_messages(name):
    tokens = tokenize(TALK, TEMPLATES[name])
    assert (np.diff(tokens.turn) >= 0).all()
    for number, message in enumerate(TALK):
        text = "".join(pieces(tokens, tokens.turn == number))
        assert message["content"] in text
        assert not any(other["content"] in text for other in TALK if other is not message)
    assert sorted(set(tokens.turn[tokens.trainable].tolist())) == [1, 3]


def test_marks_and_prefixes_give_one_mask():
    for turns, tools in ((TALK, None), (TOOL_TALK, TOOLS)):
        marked = tokenize(turns, CHATML_MARKED, tools=tools)
        plain = tokenize(turns, CHATML, tools=tools)
        for field in ("input_ids", "trainable", "turn", "protected"):
            assert np.array_equal(getattr(marked, field), getattr(plain, field)), field


def test_marked_spans_are_those_of_transformers():
    tokens = tokenize(TOOL_TALK, CHATML_MARKED, tools=TOOLS)
    made = chat_tokenizer(CHATML_MARKED).apply_chat_template(
        TOOL_TALK, tools=TOOLS, return_assistant_tokens_mask=True, return_dict=True
    )
    assert tokens.input_ids.tolist() == made["input_ids"]
    assert tokens.trainable.astype(int).tolist() == made["assistant_masks"]


def test_calls_are_trained_and_tools_are_not():
    tokens = tokenize(TOOL_TALK, CHATML, tools=TOOLS)
    call, answer = pieces(tokens, tokens.trainable)
    assert '"name": "add"' in call and call.endswith("<|im_end|>")
    assert answer == "It is 4.<|im_end|>"
    assert tokens.turn[tokens.trainable].tolist() == sorted(tokens.turn[tokens.trainable].tolist())
    asked = [*TOOL_TALK[:3], {**TOOL_TALK[3], "train": 1}, TOOL_TALK[4]]
    tokens = tokenize(asked, CHATML, tools=TOOLS)
    assert pieces(tokens, tokens.trainable)[1] == "<|im_start|>tool\n4<|im_end|>\n"


def test_arguments_as_text_are_shown_as_an_object():
    text = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    turns = [*TOOL_TALK[:2], {**TOOL_TALK[2], "tool_calls": [text]}, *TOOL_TALK[3:]]
    wanted = tokenize(TOOL_TALK, CHATML).input_ids
    assert np.array_equal(tokenize(turns, CHATML).input_ids, wanted)


def test_a_turn_that_may_not_be_trained_is_left_out():
    turns = [TALK[0], {**TALK[1], "train": 0}, *TALK[2:]]
    for template in (CHATML, CHATML_MARKED):
        tokens = tokenize(turns, template)
        assert pieces(tokens, tokens.trainable) == ["Hello there!<|im_end|>"]
        assert pieces(tokens, tokens.protected) == ["<|im_end|>"]
    with pytest.raises(InputError, match="no trainable token"):
        tokenize([TALK[0], {**TALK[1], "train": 0}], CHATML)


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
def test_train_on_last_and_on_all(template):
    tokens = tokenize(TALK, template, train_on="last")
    assert pieces(tokens, tokens.trainable) == ["Hello there!<|im_end|>"]
    tokens = tokenize(TALK, template, train_on="all")
    assert tokens.trainable.tolist() == [False] + [True] * (len(tokens.input_ids) - 1)
    assert pieces(tokens, tokens.protected) == ["<|im_end|>"] * 2


THOUGHT = [
    TALK[0],
    {**TALK[1], "reasoning_content": "hm"},
    TALK[2],
    {**TALK[3], "reasoning_content": "aha"},
]


def test_a_template_that_drops_earlier_thinking_is_refused():
    with pytest.raises(InputError, match="rewrites history: message 1"):
        tokenize(THOUGHT, THINKING)
    tokens = tokenize(THOUGHT, THINKING, train_on="last")
    assert pieces(tokens, tokens.trainable) == ["<think>aha</think>Hello there!<|im_end|>"]
    tokens = tokenize(THOUGHT[:2], THINKING)
    assert pieces(tokens, tokens.trainable) == [
        "<think>hm</think>It returns the sum. \U0001f600<|im_end|>"
    ]
    whole = tokenize(THOUGHT, THINKING, train_on="all")
    assert whole.trainable[1:].all()
    assert pieces(whole, whole.protected) == ["<|im_end|>"]  # the end of turn 1 is not known


MARKED_THINKING = THINKING.replace(
    "{{ m.content + '<|im_end|>\\n' }}",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\\n' }}{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}",
)


def test_marks_allow_a_template_to_drop_earlier_thinking():
    tokens = tokenize(THOUGHT, MARKED_THINKING)
    assert pieces(tokens, tokens.trainable) == [
        "It returns the sum. \U0001f600<|im_end|>",
        "Hello there!<|im_end|>",
    ]
    assert sorted(set(tokens.turn[tokens.trainable].tolist())) == [1, 3]


TWICE = [*THOUGHT[:2], {**THOUGHT[1], "content": "An integer."}, *THOUGHT[2:]]


def test_marks_number_the_turns_whose_borders_are_not_known():
    """Two turns in a row lose their thinking: where the second starts, no rendering shows."""
    tokens = tokenize(TWICE, MARKED_THINKING)
    assert pieces(tokens, tokens.trainable) == [
        "It returns the sum. \U0001f600<|im_end|>",
        "An integer.<|im_end|>",
        "Hello there!<|im_end|>",
    ]
    assert sorted(set(tokens.turn[tokens.trainable].tolist())) == [1, 2, 4]
    assert (np.diff(tokens.turn) >= 0).all()


def test_marks_that_cannot_be_told_apart_are_refused():
    both = MARKED_THINKING.replace(
        "{{ '<think>' + m.reasoning_content + '</think>' }}",
        "{% generation %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endgeneration %}",
    )
    with pytest.raises(InputError, match=r"message 1 \(4 marks for 3 turns"):
        tokenize(TWICE, both)
    tokens = tokenize(THOUGHT[:2], both)  # two marks in one turn whose borders are known
    assert pieces(tokens, tokens.trainable) == [
        "<think>hm</think>It returns the sum. \U0001f600<|im_end|>"
    ]
    assert pieces(tokens, tokens.protected) == ["<|im_end|>"]


def test_an_end_of_turn_outside_the_marks_is_trained_all_the_same():
    narrow = CHATML_MARKED.replace(
        "{{ '<|im_end|>' }}{% endgeneration %}", "{% endgeneration %}{{ '<|im_end|>' }}"
    )
    assert narrow != CHATML_MARKED
    tokens = tokenize(TALK, narrow)
    assert np.array_equal(tokens.trainable, tokenize(TALK, CHATML_MARKED).trainable)
    assert pieces(tokens, tokens.protected) == ["<|im_end|>"] * 2


def test_the_start_of_the_next_turn_is_no_end_of_turn():
    bare = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    for template in (bare, bare.replace("{% generation %}", "").replace("{% endgeneration %}", "")):
        tokens = tokenize(TALK, template)
        assert pieces(tokens, tokens.trainable) == [TALK[1]["content"], TALK[3]["content"]]
        assert not tokens.protected.any()


def test_a_template_that_closes_every_rendering_has_both_ends_protected():
    """Phi 3's: without a generation prompt, the end of sequence stands after the last turn."""
    closing = CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    tokens = tokenize(TALK, closing)
    assert pieces(tokens, tokens.trainable) == [
        "It returns the sum. \U0001f600<|im_end|>",
        "Hello there!<|im_end|>\n<|eos|>",
    ]
    assert pieces(tokens, tokens.protected) == ["<|im_end|>"] * 2 + ["<|eos|>"]


def test_a_chat_may_begin_with_the_assistant():
    for template in (CHATML, CHATML_MARKED, LLAMA):
        tokens = tokenize([TALK[1], *TALK[:2]], template)
        assert pieces(tokens, tokens.trainable) == [TALK[1]["content"] + "<|im_end|>"] * 2


def test_marks_that_are_missing_or_miscounted_are_refused():
    silent = CHATML_MARKED.replace("m.role == 'assistant'", "m.role == 'nobody'")
    with pytest.raises(InputError, match="marks no generation in message 1"):
        tokenize(TALK, silent)


def test_a_template_that_leaves_out_an_answer_or_a_call_is_refused():
    in_parts = CHATML.replace(
        "{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}"
    )
    with pytest.raises(InputError, match=r"leaves out what message 1 says \('It returns"):
        tokenize(TALK, in_parts)
    with pytest.raises(InputError, match=r"leaves out what message 2 says \('add'\)"):
        tokenize(TOOL_TALK, CHATML.replace("m.tool_calls", "false"))


# Without the emoji: transformers' own mask ends at the first byte of a last character.
PLAIN = [TALK[0], {"role": "assistant", "content": "It returns the sum."}, *TALK[2:]]


def published_templates():
    spec = importlib.util.find_spec("trl")
    home = Path(spec.origin).parent / "chat_templates" if spec and spec.origin else Path("none")
    return sorted(path.stem for path in home.glob("*.jinja"))


@pytest.mark.parametrize("name", published_templates())
@pytest.mark.parametrize("turns", [PLAIN[:2], PLAIN], ids=["one", "two"])
def test_published_templates_are_told_apart_or_refused(name, turns):
    """The templates that TRL brings: those of most families, as published and with marks."""
    home = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
    template = (home / f"{name}.jinja").read_text()
    tokenizer = chat_tokenizer(template)
    special = set(re.findall(r"<[|\uff5c]?[\w\u2581]+[|\uff5c]?>", template)) - {"<think>"}
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(special)})
    tokens, refusal = None, ""
    try:
        tokens = tokenize(turns, template, tokenizer=tokenizer)
    except InputError as error:
        refusal = str(error)
    if tokens is None:
        assert re.search("rewrites history|leaves out|no attribute 'text'", refusal), refusal
        assert not name.endswith("_training") or "rewrites" not in refusal
        return
    made = tokenizer.apply_chat_template(turns, return_assistant_tokens_mask=True, return_dict=True)
    assert tokens.input_ids.tolist() == made["input_ids"]
    mask = np.array(made["assistant_masks"], np.bool_)
    if mask.any():  # marked: at most the end of a turn is added
        assert not (mask & ~tokens.trainable).any()
        added = tokens.trainable & ~mask
        assert added.sum() <= len(turns)
    for number, turn in enumerate(turns):
        inside = tokens.trainable & (tokens.turn == number)
        text = tokenizer.decode(tokens.input_ids[inside])
        assert (turn["content"] in text) == (turn["role"] == "assistant")
        other = turns[number - 1]["content"] if number else turns[1]["content"]
        assert other not in text


def test_what_the_template_refuses_is_refused_with_its_words():
    with pytest.raises(InputError, match=r"refuses this chat: System role not supported"):
        tokenize([{"role": "system", "content": "x"}, *TALK], GEMMA)
    with pytest.raises(InputError, match="refuses this chat"):
        tokenize(TALK, "{{ messages[0].missing.part }}")


def test_default_template_for_a_tokenizer_without_one():
    tokens = tokenize(TALK, None)
    wanted = chat_tokenizer(DEFAULT_TEMPLATE).apply_chat_template(
        TALK, return_assistant_tokens_mask=True, return_dict=True
    )
    assert tokens.input_ids.tolist() == wanted["input_ids"]
    assert tokens.trainable.astype(int).tolist() == wanted["assistant_masks"]
    assert pieces(tokens, tokens.trainable)[1] == "Hello there!<|eos|>"
    assert pieces(tokens, tokens.protected) == ["<|eos|>"] * 2
    call, _ = pieces(t := tokenize(TOOL_TALK, None, tools=TOOLS), t.trainable)
    assert '"add"' in call


def text_tokens(text, tokenizer=None, **options):
    messages, _ = chats.parse({"text": text}, "text")
    return ChatTokenizer(tokenizer or chat_tokenizer(), **options)(messages)


def test_plain_text_is_trained_whole_and_ends():
    tokens = text_tokens("Hello there!")
    tokenizer = chat_tokenizer()
    assert tokens.input_ids.tolist() == [*tokenizer("Hello there!")["input_ids"], 2]
    assert tokens.trainable.tolist() == [False] + [True] * (len(tokens.input_ids) - 1)
    assert np.flatnonzero(tokens.protected).tolist() == [len(tokens.input_ids) - 1]
    assert not tokens.turn.any()
    assert not text_tokens("Hello there!", add_eos=False).protected.any()
    assert text_tokens("Hi<|eos|>").input_ids.tolist().count(2) == 1


def test_packed_documents_have_turns_of_their_own():
    tokens = text_tokens("Hello<|eos|>there<|eos|>!")
    ends = np.flatnonzero(tokens.input_ids == 2)
    assert len(ends) == 3
    assert np.array_equal(np.flatnonzero(tokens.protected), ends)
    assert tokens.turn[ends].tolist() == [0, 1, 2]
    assert tokens.turn[ends[:2] + 1].tolist() == [1, 2]


def test_a_start_of_sequence_that_is_also_its_end_starts_no_document():
    tokenizer = chat_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|eos|> $A", special_tokens=[("<|eos|>", 2)]
    )
    tokens = text_tokens("Hi", tokenizer)
    assert tokens.input_ids[[0, -1]].tolist() == [2, 2]
    assert not tokens.turn.any() and np.flatnonzero(tokens.protected).tolist() == [
        len(tokens.input_ids) - 1
    ]


def test_truncation_is_flagged_and_never_leaves_a_sample_empty():
    whole = tokenize(TALK, CHATML)
    first = int(np.flatnonzero(whole.trainable)[0])
    n = len(whole.input_ids)
    assert not tokenize(TALK, CHATML, max_length=n).truncated
    cut = tokenize(TALK, CHATML, max_length=n - 1)
    assert cut.truncated and np.array_equal(cut.input_ids, whole.input_ids[:-1])
    least = tokenize(TALK, CHATML, max_length=first + 1)
    assert least.trainable.tolist() == [False] * first + [True]
    with pytest.raises(InputError, match=f"truncated before its first.*token {first}, and"):
        tokenize(TALK, CHATML, max_length=first)


def test_white_space_around_answers_is_kept_whichever_way_tokens_fall():
    """GPT-2's tokens take the space before a word along, and hide it from their offsets."""
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    for text in ("  the function \n\n", "the function", "\n x"):
        turns = [TALK[0], {"role": "assistant", "content": text}]
        for template in (CHATML, CHATML_MARKED, CHATML.replace("\\n", " ")):
            tokens = tokenize(turns, template, tokenizer=tokenizer, chat_template=template)
            if not text.startswith("\n") and template not in (CHATML, CHATML_MARKED):
                continue  # the space before the answer is one token with its start
            assert pieces(tokens, tokens.trainable) == [text + "<|im_end|>"]


def test_a_token_that_straddles_prompt_and_answer_is_trained():
    """Without a border in the pre-tokenizer, one token may hold the end of a prompt too."""
    tokenizer = chat_tokenizer(CHATML.replace("\\n", " "))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    turns = [TALK[0], {"role": "assistant", "content": "the function"}]
    tokens = tokenize(turns, None, tokenizer=tokenizer)
    assert pieces(tokens, tokens.trainable) == [" the function<|im_end|>"]


words = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12
).filter(lambda text: text.strip() and "<|" not in text)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(words, words), min_size=1, max_size=3), st.sampled_from(sorted(TEMPLATES))
)
def test_any_text_is_found_again(pairs, name):
    turns = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    tokens = tokenize(turns, TEMPLATES[name])
    said = [pair[1].strip() if name == "gemma" else pair[1] for pair in pairs]
    assert pieces(tokens, tokens.trainable) == [text + "<|im_end|>" for text in said]
    wanted = chat_tokenizer(TEMPLATES[name]).apply_chat_template(turns)["input_ids"]
    assert tokens.input_ids.tolist() == wanted


def test_a_slow_tokenizer_or_one_without_an_end_is_refused():
    class Slow:
        is_fast = False
        name_or_path = "slow"

    with pytest.raises(ModelError, match="expected a fast tokenizer"):
        ChatTokenizer(Slow())
    endless = chat_tokenizer(CHATML)
    endless.eos_token = None
    with pytest.raises(ModelError, match="end-of-sequence"):
        ChatTokenizer(endless)
    ChatTokenizer(endless, add_eos=False)
    endless.chat_template = None
    with pytest.raises(ModelError, match="end-of-sequence"):
        ChatTokenizer(endless, add_eos=False)


def test_template_options_reach_the_template():
    template = "{{ '<|bos|>' + (style or '') }}" + CHATML
    template = template.replace("(style or '')", "(style | default(''))")
    short = tokenize(TALK, template)
    long = tokenize(TALK, template, template_options={"style": "brief"})
    assert len(long.input_ids) > len(short.input_ids)
    assert long.trainable.sum() == short.trainable.sum()


def test_named_templates_are_chosen_as_transformers_does():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = {"default": LLAMA, "tool_use": CHATML}
    plain = tokenize(TALK, None, tokenizer=tokenizer)
    assert np.array_equal(plain.input_ids, tokenize(TALK, LLAMA).input_ids)
    with_tools = tokenize(TOOL_TALK, None, tokenizer=tokenizer, tools=TOOLS)
    assert np.array_equal(with_tools.input_ids, tokenize(TOOL_TALK, CHATML, tools=TOOLS).input_ids)


def test_digests_follow_what_decides_the_ids(tmp_path):
    plain = chat_tokenizer(CHATML)
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path)
    assert tokenizer_sha256(again) == tokenizer_sha256(plain)
    assert template_sha256(again.chat_template) == template_sha256(CHATML)
    assert ChatTokenizer(plain).digests == {
        "tokenizer": tokenizer_sha256(plain),
        "chat_template": template_sha256(CHATML),
    }
    again.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    assert tokenizer_sha256(again) != tokenizer_sha256(plain)
    assert template_sha256(LLAMA) != template_sha256(CHATML)


def run(store, step, name, inputs=None, bad_rows=0.0, **options):
    spec = STEPS[step]
    context = StepContext(store, name=name, bad_rows=bad_rows)
    return spec(spec.options(**options), inputs or {}, context)


@pytest.fixture
def store(tmp_path):
    """A store with six chats, of which the last has nothing to train."""
    rows = [{"messages": TALK, "kind": "talk"}] * 5
    rows.append({"messages": [TALK[0], {**TALK[1], "train": False}], "kind": "mute"})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat_tokenizer(CHATML).save_pretrained(tmp_path / "tokenizer")
    store = Store(tmp_path / "store")
    run(store, "read_chats", "chats", path=str(path), domain_field="kind")
    return store


def test_step_writes_tokens_and_puts_bad_rows_aside(store, tmp_path):
    options = {"tokenizer": str(tmp_path / "tokenizer"), "max_length": 40}
    with pytest.raises(InputError, match=r"rows\.jsonl#6 \(id \d+\): no trainable token"):
        run(store, "tokenize_chats", "tokens", {"chats": "chats"}, **options)
    manifest = run(store, "tokenize_chats", "tokens", {"chats": "chats"}, bad_rows=0.5, **options)
    assert (manifest.rows, manifest.rejected) == (5, 1)
    table = store.table("tokens").to_table()
    assert table.schema.equals(TOKENS)
    wanted = tokenize(TALK, CHATML, max_length=40)
    for row in table.to_pylist():
        assert row["domain"] == "talk"
        assert row["truncated"] is True
        for field in ("input_ids", "trainable", "turn", "protected"):
            assert row[field] == getattr(wanted, field).tolist()
    tokenizer = chat_tokenizer(CHATML)
    assert manifest.models == ChatTokenizer(tokenizer).digests


def test_key_follows_tokenizer_template_and_options(store, tmp_path):
    folder = str(tmp_path / "tokenizer")
    (tmp_path / "llama.jinja").write_text(LLAMA)
    inputs = {"chats": "chats"}

    def key(**options):
        options = {"tokenizer": folder, **options}
        return run(store, "tokenize_chats", "tokens", inputs, bad_rows=0.5, **options).key

    first = key()
    assert key(rows_a_shard=2) == first
    (tmp_path / "copy").mkdir()
    chat_tokenizer(CHATML).save_pretrained(tmp_path / "copy")
    assert key(tokenizer=str(tmp_path / "copy")) == first
    others = [
        key(chat_template=str(tmp_path / "llama.jinja")),
        key(max_length=50),
        key(train_on="last"),
        key(template_options={"style": "x"}),
    ]
    assert len({first, *others}) == 5


def test_a_template_that_writes_the_date_has_the_date_in_its_key(store, tmp_path):
    (tmp_path / "dated.jinja").write_text("{{ strftime_now('%d') }}" + CHATML)
    options = {"tokenizer": str(tmp_path / "tokenizer")}
    dated = run(
        store,
        "tokenize_chats",
        "tokens",
        {"chats": "chats"},
        bad_rows=0.5,
        chat_template=str(tmp_path / "dated.jinja"),
        **options,
    )
    assert dated.options["date"] == datetime.date.today().isoformat()
    plain = run(store, "tokenize_chats", "tokens", {"chats": "chats"}, bad_rows=0.5, **options)
    assert "date" not in plain.options


def test_the_tokenizer_of_a_trained_model(store):
    lm = run(
        store,
        "train_lm",
        "model",
        {"chats": "chats"},
        hidden_size=16,
        heads=2,
        layers=1,
        steps=3,
        max_length=16,
        batch_tokens=32,
        checkpoints=0,
        vocab_size=300,
    )
    inputs = {"chats": "chats", "model": lm.key}
    manifest = run(store, "tokenize_chats", "tokens", inputs, bad_rows=0.5)
    assert manifest.rows == 5
    assert manifest.parents == [store.resolve("chats"), lm.key]
    with pytest.raises(InputError, match="train_lm step as input `model`"):
        run(store, "tokenize_chats", "tokens", {"chats": "chats"}, bad_rows=0.5)


def test_what_cannot_be_read_is_named(store, tmp_path):
    with pytest.raises(InputError, match=r"chat template .*none\.jinja"):
        run(
            store,
            "tokenize_chats",
            "tokens",
            {"chats": "chats"},
            tokenizer=str(tmp_path / "tokenizer"),
            chat_template=str(tmp_path / "none.jinja"),
        )
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="expected a folder with a tokenizer"):
        run(
            store,
            "tokenize_chats",
            "tokens",
            {"chats": "chats"},
            tokenizer=str(tmp_path / "empty"),
        )
