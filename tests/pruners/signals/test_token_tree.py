"""Trees of continuations: shape, and what a model says of them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunery.pruners.signals.token_tree import fits, groups, grow, read_texts, read_trees

from .causal_models import CONFIGS, tiny_model

TAILS = st.lists(st.lists(st.integers(3, 6), max_size=4).map(tuple), min_size=1, max_size=8)


@given(TAILS, st.lists(st.lists(st.integers(3, 6), min_size=1, max_size=2).map(tuple), max_size=3))
def test_a_node_sees_its_own_beginning_and_no_more(tails, endings):
    tree = grow(tails, endings)
    assert tree.ends.shape == (len(tails), 1 + len(endings))
    distinct = set()
    for place, tail in enumerate(tails):
        for number, ending in enumerate([(), *endings]):
            path = (*tail, *ending)
            distinct |= {path[:size] for size in range(len(path) + 1)}
            seen = np.flatnonzero(tree.sees[tree.ends[place, number]])
            assert [0, *path] == tree.tokens[seen].tolist()
            assert tree.depth[seen].tolist() == list(range(len(path) + 1))
    assert len(tree.tokens) == len(distinct)


@given(TAILS, st.integers(0, 2), st.integers(1, 9))
def test_groups_hold_everything_once_and_stay_narrow(tails, each, width):
    parts = groups(tails, each, width)
    assert sorted(place for part in parts for place in part) == list(range(len(tails)))
    endings = [(99,) * size for size in range(1, each + 1)]
    for part in parts:
        count = len(grow([tails[place] for place in part], endings).tokens)
        assert count <= max(width, 1 + len(tails[part[0]]) + each)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_nodes_are_what_the_model_says_of_each_sequence_alone(name):
    model = tiny_model(name)
    if name.startswith("gemma"):  # windows of 4 tokens: the caller reads shorter texts so
        model.config.sliding_window = 64
        for layer in model.model.layers:
            layer.self_attn.sliding_window = 64 if layer.self_attn.sliding_window else None
    texts = [(5, 9, 4), (7,), (11, 12, 13, 14, 15)]
    tails = [(), (8,), (8, 9), (8, 10), (30, 31, 32)]
    tree = grow(tails, [(40,), (40, 41)])
    with torch.no_grad():
        assert fits(model)
        prefix = read_texts(model, [text[:-1] for text in texts], 3)
        for _ in range(2):
            hidden = read_trees(model, prefix, [text[-1] for text in texts], [tree])
        for row, text in enumerate(texts):
            for place, tail in enumerate(tails):
                for number, ending in enumerate([(), (40,), (40, 41)]):
                    ids = torch.tensor([[*text, *tail, *ending]])
                    wanted = model.get_decoder()(input_ids=ids, use_cache=False)
                    found = hidden[row, tree.ends[place, number]]
                    gap = (found - wanted.last_hidden_state[0, -1]).abs().max()
                    assert gap < 1e-4 * wanted.last_hidden_state.abs().max()


def test_texts_without_a_token_before_the_root():
    model = tiny_model("llama")
    tree = grow([(8,), (9,)])
    with torch.no_grad():
        hidden = read_trees(model, read_texts(model, [(), ()], 3), [5, 6], [tree, grow([(7,)])])
        for row, ids in ((0, [5, 9]), (1, [6, 7])):
            wanted = model.get_decoder()(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
            node = tree.ends[1, 0] if row == 0 else 1
            torch.testing.assert_close(hidden[row, node], wanted, rtol=1e-4, atol=1e-4)
