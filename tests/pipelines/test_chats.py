"""Rows of every format become the same chats, and what is wrong is named by file, row and key."""

import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunery.errors import InputError
from prunery.pipelines import builtin_chats, chats
from prunery.pipelines.engine import StepContext
from prunery.pipelines.sft_tables import CHATS
from prunery.pipelines.steps import STEPS
from prunery.storage import Store

USER = {"role": "user", "content": "What is 2 + 2?"}
ANSWER = {"role": "assistant", "content": "4."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}


class Rejects:
    def __init__(self):
        self.seen = []

    def __call__(self, row, reason, where):
        self.seen.append((row, reason, where))


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path, reject=None, domain_field=None, **options):
    found = chats.scan_chats([str(path)], **options)
    reject = reject or Rejects()
    return [
        row
        for piece in found.pieces
        for row in chats.read_chats(piece, reject, domain_field=domain_field)
    ]


def said(row):
    return [(turn["role"], turn["content"], turn["train"]) for turn in row["messages"]]


BOTH = [("user", "What is 2 + 2?", False), ("assistant", "4.", True)]
FORMATS = {
    "messages": {"messages": [USER, ANSWER]},
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "What is 2 + 2?"},
            {"from": "gpt", "value": "4."},
        ]
    },
    "prompt_completion": {"prompt": "What is 2 + 2?", "completion": "4."},
    "alpaca": {"instruction": "What is 2 + 2?", "input": "", "output": "4."},
    "text": {"text": "2 + 2 is 4."},
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("format", FORMATS)
def test_formats_are_told_by_their_keys(tmp_path, format, suffix):
    row = FORMATS[format] | {"from": "web", "n": 3}
    path = write(tmp_path / f"rows{suffix}", [row, row])
    found = read(path, domain_field="from")
    assert [r["format"] for r in found] == [format] * 2
    assert [r["source"] for r in found] == [f"{path.name}#1", f"{path.name}#2"]
    assert [r["domain"] for r in found] == ["web", "web"]
    wanted = [("text", "2 + 2 is 4.", True)] if format == "text" else BOTH
    assert [said(r) for r in found] == [wanted] * 2
    assert [json.loads(r["raw"]) for r in found] == [row, row]
    assert found[0]["id"] != found[1]["id"]
    pa.Table.from_pylist(found, CHATS)


def test_raw_is_the_line_itself(tmp_path):
    line = '{"completion":"4.",  "prompt": "caf\\u00e9 \\ud83d\\ude00 é" , "n": 1e3}'
    (tmp_path / "rows.jsonl").write_text(line + "\r\n")
    (row,) = read(tmp_path / "rows.jsonl")
    assert row["raw"] == line
    assert row["messages"][0]["content"] == "café \U0001f600 é"


def test_a_json_file_may_hold_an_object_a_line(tmp_path):
    (tmp_path / "rows.json").write_text(
        "\n" + json.dumps(FORMATS["alpaca"]) + "\n" + json.dumps(FORMATS["alpaca"])
    )
    assert [row["source"] for row in read(tmp_path / "rows.json")] == ["rows.json#2", "rows.json#3"]


def test_a_damaged_array_is_an_error_with_the_file(tmp_path):
    (tmp_path / "rows.json").write_text('[{"text": "a"}, {"text": ')
    with pytest.raises(InputError, match=r"rows\.json: expected one JSON array"):
        read(tmp_path / "rows.json")


def test_messages_win_over_a_prompt_beside_them():
    row = {"prompt": "p", "completion": "c", "text": "t"}
    assert chats.detect(row | {"messages": []}) == "messages"
    assert chats.detect(row | {"messages": None}) == "prompt_completion"
    assert chats.detect({"conversation": []}) == "sharegpt"
    assert chats.detect({"instruction": "i", "output": "o", "text": "t"}) == "alpaca"
    assert chats.detect({"instruction": "i", "text": "t"}) == "text"
    assert chats.detect({"question": "q"}) is None


def test_two_formats_in_one_file_are_an_error_with_row_and_key(tmp_path):
    path = write(tmp_path / "rows.jsonl", [FORMATS["messages"], FORMATS["alpaca"]])
    with pytest.raises(InputError, match=r"rows\.jsonl, row 2, key instruction.*alpaca after mess"):
        read(path)


def test_another_format_further_down_is_rejected_with_row_and_key(tmp_path):
    path = write(tmp_path / "rows.jsonl", [FORMATS["messages"]] * 30 + [FORMATS["alpaca"]])
    rejects = Rejects()
    assert len(read(path, rejects)) == 30
    ((row, reason, where),) = rejects.seen
    assert row == FORMATS["alpaca"]
    assert where == "rows.jsonl, row 31, key instruction"
    assert "expected messages" in reason and "found alpaca" in reason


def test_unknown_keys_are_an_error_with_the_known_ones(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(InputError, match=r"row 1: .*messages \(messages\).*found question, answer"):
        read(path)


def test_a_given_format_reads_its_keys_whatever_else_is_there(tmp_path):
    path = write(tmp_path / "rows.jsonl", [FORMATS["messages"] | {"text": "plain"}])
    (row,) = read(path, format="text")
    assert said(row) == [("text", "plain", True)]
    rejects = Rejects()
    assert read(path, rejects, format="alpaca") == []
    assert rejects.seen[0][2] == "rows.jsonl, row 1, key instruction"


def test_sharegpt_has_system_tools_and_calls():
    row = {
        "system": "Be brief.",
        "tools": json.dumps([{"name": "add"}]),
        "conversations": [
            {"from": "human", "value": "2 + 2?"},
            {"from": "function_call", "value": json.dumps(CALL["function"])},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "4."},
        ],
    }
    messages, tools = chats.parse(row, "sharegpt")
    assert [(m["role"], m["content"], m["train"]) for m in messages] == [
        ("system", "Be brief.", False),
        ("user", "2 + 2?", False),
        ("assistant", "", True),
        ("tool", "4", False),
        ("assistant", "4.", True),
    ]
    assert json.loads(messages[2]["tool_calls"]) == [CALL]
    assert json.loads(tools) == [{"name": "add"}]


def test_openai_calls_keep_their_ids_and_reasoning():
    row = {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL | {"id": "c1"}]},
            {"role": "tool", "content": "4", "tool_call_id": "c1", "name": "add"},
            {"role": "assistant", "content": "4.", "reasoning_content": "easy", "name": None},
        ],
        "tools": [{"type": "function", "function": {"name": "add"}}],
    }
    messages, tools = chats.parse(row, "messages")
    assert json.loads(messages[1]["tool_calls"]) == [CALL | {"id": "c1"}]
    assert json.loads(messages[2]["tool_calls"]) == {"tool_call_id": "c1", "name": "add"}
    assert json.loads(messages[3]["tool_calls"]) == {"reasoning_content": "easy"}
    assert json.loads(tools) == row["tools"]
    assert messages[0]["tool_calls"] == ""


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": " 2 + 2?"}]
    messages, _ = chats.parse(
        {"messages": [{"role": "user", "content": parts}, ANSWER]}, "messages"
    )
    assert messages[0]["content"] == "What is 2 + 2?"


def test_alpaca_has_input_system_and_history():
    row = {
        "system": "Be brief.",
        "history": [["hi", "hello"]],
        "instruction": "Add.",
        "input": "2, 2",
        "output": "4",
    }
    messages, _ = chats.parse(row, "alpaca")
    assert [(m["role"], m["content"]) for m in messages] == [
        ("system", "Be brief."),
        ("user", "hi"),
        ("assistant", "hello"),
        ("user", "Add.\n\n2, 2"),
        ("assistant", "4"),
    ]


def test_only_the_completion_of_message_lists_is_trained():
    row = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    messages, _ = chats.parse(row, "prompt_completion")
    assert [m["train"] for m in messages] == [False, False, False, True]


@pytest.mark.parametrize(("key", "value"), [("train", 0), ("weight", 0), ("train", False)])
def test_a_turn_may_be_left_out_or_asked_for(key, value):
    turns = [{**USER, key: 1 - int(value)}, {**ANSWER, key: value}, USER, ANSWER]
    messages, _ = chats.parse({"messages": turns}, "messages")
    assert [m["train"] for m in messages] == [True, False, False, True]


def test_a_last_question_is_allowed_but_some_answer_is_not_optional():
    assert len(chats.parse({"messages": [USER, ANSWER, USER]}, "messages")[0]) == 3
    with pytest.raises(chats.RowProblem, match="no answer"):
        chats.parse({"messages": [USER, USER]}, "messages")


def messages(*turns):
    return {"messages": list(turns)}


TOOL = {"role": "tool", "content": "4"}
BAD = [
    (messages(USER), "messages", "no answer"),
    (messages(), "messages", "a list of messages"),
    ({"messages": "hi"}, "messages", "a list of messages; found str 'hi'"),
    (messages("hi", ANSWER), "messages[0]", "a message with role and content"),
    (messages({"content": "x"}, ANSWER), "messages[0].role", "found nothing"),
    (messages({"role": "king", "content": "x"}, ANSWER), "messages[0].role", "found str 'king'"),
    (messages({"from": "king", "value": "x"}, ANSWER), "messages[0].from", "found str 'king'"),
    (messages({"role": 3, "content": "x"}, ANSWER), "messages[0].role", "found int '3'"),
    (messages({"role": "user", "content": 3}, ANSWER), "messages[0].content", "found int '3'"),
    (messages({"role": "user"}, ANSWER), "messages[0].content", "expected text; found nothing"),
    (messages({"role": "user", "content": " \n"}, ANSWER), "messages[0].content", "white space"),
    (messages(USER, {"role": "assistant", "content": ""}), "messages[1].content", "white space"),
    (messages(USER, {"role": "assistant", "content": None}), "messages[1].content", "nothing"),
    (
        messages({"role": "user", "content": [{"type": "image_url"}]}, ANSWER),
        "messages[0].content[0]",
        "found str 'image_url'",
    ),
    (messages({"role": "user", "content": "\ud800"}, ANSWER), "messages[0].content", "surrogate"),
    (messages(USER, {**ANSWER, "weight": 0.5}), "messages[1].weight", "0 or 1; found float"),
    (messages(USER, {**ANSWER, "train": "yes"}), "messages[1].train", "0 or 1; found str"),
    (messages(TOOL, USER, ANSWER), "messages", "message 0 is an orphan"),
    (messages(USER, TOOL, ANSWER), "messages", "message 1 is an orphan: a tool answers after user"),
    (
        messages(
            USER,
            {"role": "assistant", "tool_calls": [CALL | {"id": "c1"}]},
            {**TOOL, "tool_call_id": "c2"},
            ANSWER,
        ),
        "messages",
        "to the call 'c2', which nobody made",
    ),
    (messages({**USER, "tool_calls": [CALL]}, ANSWER), "messages[0].tool_calls", "assistant only"),
    (messages(USER, {**ANSWER, "tool_calls": "x"}), "messages[1].tool_calls", "as JSON"),
    (messages(USER, {**ANSWER, "tool_calls": [3]}), "messages[1].tool_calls", "function's name"),
    (messages(USER, ANSWER) | {"tools": "x"}, "tools", "a list of tools as JSON"),
    (messages(USER, ANSWER) | {"tools": {"a": 1}}, "tools", "a list of objects"),
    ({"prompt": 3, "completion": "c"}, "prompt", "text or a list of messages"),
    ({"prompt": "p", "completion": ""}, "completion", "white space"),
    ({"prompt": "p", "completion": [USER]}, "completion", "no answer"),
    ({"instruction": "i", "output": 3}, "output", "expected text"),
    ({"instruction": "i", "output": "o", "input": 3}, "input", "expected text"),
    ({"instruction": "i", "output": "o", "history": [["a"]]}, "history[0]", "a pair of texts"),
    ({"text": " "}, "text", "white space"),
    ({"text": ["a"]}, "text", "expected text; found list"),
    (
        {"conversations": [{"from": "function_call", "value": "x"}]},
        "conversations[0].value",
        "JSON",
    ),
]


@pytest.mark.parametrize(("row", "key", "reason"), BAD)
def test_a_bad_row_is_put_aside_with_file_row_and_key(tmp_path, row, key, reason):
    good = FORMATS[chats.detect(row)]
    path = write(tmp_path / "rows.jsonl", [good, row, good])
    rejects = Rejects()
    assert [r["source"][-2:] for r in read(path, rejects)] == ["#1", "#3"]
    ((_, why, where),) = rejects.seen
    assert where == f"rows.jsonl, row 2, key {key}"
    assert reason in why


def test_damaged_lines_and_wrong_values_are_put_aside(tmp_path):
    good = json.dumps(FORMATS["text"])
    (tmp_path / "rows.jsonl").write_bytes(
        f'{good}\n{{"text"\n[1]\n\n{good}\n'.encode() + b'"\xff"\n'
    )
    rejects = Rejects()
    assert len(read(tmp_path / "rows.jsonl", rejects)) == 2
    assert [where for _, _, where in rejects.seen] == [
        f"rows.jsonl, row {row}" for row in (2, 3, 6)
    ]
    write(tmp_path / "rows.json", [FORMATS["text"], 3])
    rejects = Rejects()
    assert len(read(tmp_path / "rows.json", rejects)) == 1
    assert "expected a JSON object; found int" in rejects.seen[0][1]


def test_domains_may_be_nested_numbers_or_missing(tmp_path):
    rows = [FORMATS["text"] | {"meta": meta} for meta in ({"kind": "web"}, {"kind": 3}, {}, None)]
    path = write(tmp_path / "rows.jsonl", [*rows, FORMATS["text"] | {"meta": {"kind": [1]}}])
    rejects = Rejects()
    found = read(path, rejects, domain_field="meta.kind")
    assert [row["domain"] for row in found] == ["web", "3", "", ""]
    assert rejects.seen[0][2].endswith("row 5, key meta.kind")


def test_folders_skip_other_files_and_equal_names_stay_apart(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "rows.jsonl", [FORMATS["text"]])
    (tmp_path / "a" / "notes.txt").write_text("no rows")
    found = chats.scan_chats([str(tmp_path / "a"), str(tmp_path / "b" / "rows.jsonl")])
    assert found.skipped == ("notes.txt",)
    rows = [row for piece in found.pieces for row in chats.read_chats(piece, Rejects())]
    assert [row["source"] for row in rows] == ["rows.jsonl#1", "rows.jsonl (2)#1"]
    assert rows[0]["id"] != rows[1]["id"]
    with pytest.raises(InputError, match="known endings are .jsonl, .ndjson, .json, .parquet"):
        chats.scan_chats([str(tmp_path / "a" / "notes.txt")])


def test_pieces_do_not_change_rows(tmp_path):
    rows = [FORMATS["alpaca"] | {"output": str(n)} for n in range(50)]
    path = write(tmp_path / "rows.jsonl", rows)
    assert len(chats.scan_chats([str(path)], piece_bytes=300).pieces) > 5
    assert read(path, piece_bytes=300) == read(path)


names = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "x", None, 3])
values = st.one_of(st.none(), st.text(max_size=4), st.integers(), st.lists(st.text(max_size=2)))
turns = st.lists(
    st.one_of(values, st.dictionaries(st.sampled_from(["role", "content", "from"]), values | names))
)


@given(st.dictionaries(st.sampled_from(["messages", "tools", "prompt", "text"]), turns | values))
def test_any_row_is_read_or_refused_with_a_key(record):
    for format in FORMATS:
        try:
            found, _ = chats.parse(record, format)
        except chats.RowProblem:
            continue
        assert {turn["role"] for turn in found} & {"assistant", "text"}
        pa.array(found, CHATS.field("messages").type.value_type)


def run(store, path, **options):
    spec = STEPS["read_chats"]
    context = StepContext(store, name="chats", bad_rows=options.pop("bad_rows", 0.0))
    return spec(spec.options(path=path, **options), {}, context)


def test_step_stops_at_a_bad_row_or_puts_it_aside(tmp_path):
    path = write(tmp_path / "rows.jsonl", [FORMATS["messages"], messages(USER)])
    store = Store(tmp_path / "store")
    with pytest.raises(InputError, match=r"rows\.jsonl, row 2, key messages: no answer"):
        run(store, str(path))
    manifest = run(store, str(path), bad_rows=0.5)
    assert (manifest.rows, manifest.rejected) == (1, 1)
    (rejected,) = store.table("chats").rejects().to_pylist()
    assert json.loads(rejected["row"]) == messages(USER)


def test_key_follows_contents_format_and_domain(tmp_path):
    path = write(tmp_path / "rows.jsonl", [FORMATS["text"] | {"d": "x"}])
    store = Store(tmp_path / "store")
    keys = [
        run(store, str(path)).key,
        run(store, str(path), domain_field="d").key,
        run(store, str(path), format="text").key,
    ]
    assert run(store, [str(path)], shard_bytes=1).key == keys[0]
    write(path, [FORMATS["text"] | {"d": "y"}])
    keys.append(run(store, str(path)).key)
    assert len(set(keys)) == 4


def test_builtin_chats_are_many_real_and_unlike(tmp_path):
    store = Store(tmp_path / "store")
    manifest = run(store, builtin_chats.NAME, shard_bytes=100_000)
    rows = store.table("chats").to_table().to_pylist()
    assert 1200 <= len(rows) == manifest.rows <= 3000
    assert len(manifest.parts) > 1
    assert len({row["id"] for row in rows}) == len(rows)
    assert {"json", "os", "re", "builtins"} <= {row["domain"] for row in rows}
    turns = [len(row["messages"]) for row in rows]
    assert set(turns) == {2, 4} and turns.count(4) > 100
    answers = [row["messages"][-1]["content"] for row in rows]
    assert len(set(answers)) == len(answers)
    assert min(map(len, answers)) >= builtin_chats.SHORTEST
    (dumps,) = (row for row in rows if json.loads(row["raw"])["about"] == "json.dumps")
    assert "json.dumps" in dumps["messages"][0]["content"]
    assert dumps["messages"][-1]["content"].startswith("Serialize ``obj`` to a JSON formatted")
    assert run(store, builtin_chats.NAME).logical_digest == manifest.logical_digest


def test_builtin_chats_do_not_hang_on_what_is_imported(monkeypatch):
    def shout(self):
        """A method that some library adds to the loggers of everyone, for whatever reason."""

    first = builtin_chats.builtin_chats()
    assert first == json.loads(json.dumps(first))
    builtin_chats.builtin_chats.cache_clear()
    monkeypatch.setattr(logging.Logger, "shout", shout, raising=False)
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    names = {name for chats in builtin_chats.collected().values() for name, _ in chats}
    assert "logging.Logger.shout" in names
    assert builtin_chats.builtin_chats() == first


def test_real_rows_are_read(shared_data, tmp_path):
    import gzip

    folder = shared_data / "sft_llamafactory_demo"
    for name, format in (("alpaca_en_demo", "alpaca"), ("glaive_toolcall_en_demo", "sharegpt")):
        path = tmp_path / f"{name}.json"
        path.write_bytes(gzip.decompress((folder / f"{name}.json.gz").read_bytes()))
        rejects = Rejects()
        found = read(path, rejects)
        assert {row["format"] for row in found} == {format}
        assert len(found) + len(rejects.seen) == len(json.loads(path.read_text()))
        assert len(rejects.seen) < 0.02 * len(found), rejects.seen[:3]
