"""Answer matching: what counts as the same string, and where it stands."""

from __future__ import annotations

import pytest

from prunery.pipelines.answers import find_answers, holds_answer


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        ("It was the Eiffel Tower.", "Eiffel tower", ["Eiffel Tower"]),
        ("Wilhelm Conrad Röntgen , of Germany", "Röntgen, of Germany", ["Röntgen , of Germany"]),
        ("in the year 2,500", "2500", []),  # digits with a separator are two tokens
        ("in the year 2,500", "2,500", ["2,500"]),
        ("cats and a category", "cat", []),  # whole words alone
        ("The Beatles", "Beatles", ["Beatles"]),
        ("Beatles", "the Beatles", ["Beatles"]),
        ("one two one two one", "one two one", ["one two one", "one two one"]),
        ("华沙的第一家文艺歌厅摩摩斯在这里", "文艺歌厅", ["文艺歌厅"]),
        ("1870 年到1939年", "1939年", ["1939年"]),
        ("กรุงเทพมหานครเป็นเมืองหลวง", "เมืองหลวง", ["เมืองหลวง"]),
        ("STRASSE", "straße", ["STRASSE"]),
        ("ＦＩＦＡ 2010", "fifa", ["ＦＩＦＡ"]),
        ("कमल का फूल", "का", ["का"]),
        ("anything", "", []),
        ("the end", "the", []),
    ],
)
def test_find(text, answer, found):
    assert [text[a:b] for a, b in find_answers(text, [answer])] == found


def test_any_alias_is_enough_and_spans_are_sorted():
    assert find_answers("b then a1", ["a1", "b"]) == [(0, 1), (7, 9)]
    assert holds_answer("b", ["x", "B"])
    assert not holds_answer("", ["x"])
    assert not holds_answer("x", [])
