"""Input embeddings read from files: the same numbers as the model's own, without running it."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from prunery.errors import InputError, ModelError
from prunery.pruners.models import token_rows
from prunery.pruners.models.encoders import packaged_folder

from ...tiny_models import packaged_tokenizer, tiny_encoder

V, D = 40, 8


def networks():
    bert = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert["intermediate_size"] = 16
    llama = dict(bert, num_key_value_heads=2)
    t5 = {"vocab_size": V, "d_model": D, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    gpt = {"vocab_size": V, "n_embd": D, "n_layer": 1, "n_head": 2, "n_positions": 32}
    return {
        "bert": BertForMaskedLM(BertConfig(**bert)),
        "llama": LlamaForCausalLM(LlamaConfig(**llama)),
        "llama_tied": LlamaForCausalLM(LlamaConfig(**llama, tie_word_embeddings=True)),
        "gpt2": GPT2LMHeadModel(GPT2Config(**gpt)),
        "t5": T5ForConditionalGeneration(T5Config(**t5)),
        "t5_encoder": T5EncoderModel(T5Config(**t5)),
    }


@pytest.mark.parametrize("name", ["bert", "llama", "llama_tied", "gpt2", "t5", "t5_encoder"])
def test_the_matrix_alone_is_read(name, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = networks()[name]
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(token_rows, "_loaded", lambda folder: pytest.fail("read as a whole"))
    made = token_rows.input_embeddings(tmp_path)
    assert made.dtype == np.float32 and made.shape == (V, D)
    np.testing.assert_array_equal(made, model.get_input_embeddings().weight.detach().numpy())


def test_shards_and_half_precision(tmp_path):
    torch.manual_seed(0)
    model = networks()["llama"].to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="1KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    made = token_rows.input_embeddings(tmp_path)
    wanted = model.get_input_embeddings().weight.detach().float().numpy()
    np.testing.assert_array_equal(made, wanted)


def test_a_tensor_of_another_name_is_found_by_reading_the_model(tmp_path, monkeypatch):
    model = networks()["bert"]
    model.save_pretrained(tmp_path)
    wanted = model.get_input_embeddings().weight.detach().numpy()
    monkeypatch.setattr(token_rows, "_stored", lambda *where: None)
    np.testing.assert_array_equal(token_rows.input_embeddings(tmp_path), wanted)


def test_numbers_that_are_not_finite_and_missing_files_are_refused(tmp_path):
    networks()["bert"].save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    state["bert.embeddings.word_embeddings.weight"][3, 3] = float("nan")
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="finite input embeddings"):
        token_rows.input_embeddings(tmp_path)
    path.unlink()
    with pytest.raises(ModelError, match=r"expected model.safetensors"):
        token_rows.input_embeddings(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="input embeddings that transformers can build"):
        token_rows.input_embeddings(tmp_path)


def test_a_word_is_the_mean_of_its_pieces():
    folder = packaged_folder()
    words = ["the", "tokenizer", "two words", "naïve"]
    made = token_rows.token_vectors(folder, words)
    matrix = AutoModel.from_pretrained(folder).get_input_embeddings().weight.detach().numpy()
    tokenizer = packaged_tokenizer()
    for vector, word in zip(made, words, strict=True):
        pieces = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(word))
        np.testing.assert_allclose(vector, matrix[pieces].mean(axis=0), rtol=1e-5, atol=1e-7)
    assert token_rows.token_vectors(folder, []).shape == (0, 384)


def test_a_byte_level_word_is_taken_with_its_space(tmp_path):
    """GPT-2's `the` inside of a sentence is another token than at the start of a text."""
    networks()["gpt2"].save_pretrained(tmp_path)
    vocab = {token: n for n, token in enumerate(["Ġ", "s", "u", "n", "su", "Ġsun", "sun"])}
    merges = [("s", "u")]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    merged = Tokenizer(models.BPE(vocab, [*merges, ("Ġ", "sun")], ignore_merges=True))
    merged.pre_tokenizer, merged.decoder = tokenizer.pre_tokenizer, tokenizer.decoder
    matrix = token_rows.input_embeddings(tmp_path)
    for made, alone, pieces in [(merged, ["sun"], ["sun"]), (tokenizer, ["su", "n"], ["su", "n"])]:
        assert made.encode("sun").tokens == alone
        PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path)
        (vector,) = token_rows.token_vectors(tmp_path, ["sun"])
        wanted = matrix[[vocab[piece] for piece in pieces]].mean(axis=0)
        np.testing.assert_allclose(vector, wanted, rtol=1e-6)
    state = json.loads(tokenizer.to_str())
    del state["model"]["vocab"]["sun"]
    state["model"]["ignore_merges"] = True
    spaced = Tokenizer.from_str(json.dumps(state))
    assert spaced.encode(" sun").tokens == ["Ġsun"] and len(spaced.encode("sun").tokens) == 2
    PreTrainedTokenizerFast(tokenizer_object=spaced).save_pretrained(tmp_path)
    (vector,) = token_rows.token_vectors(tmp_path, ["sun"])
    np.testing.assert_array_equal(vector, matrix[vocab["Ġsun"]])


def test_a_word_without_a_piece_or_a_row_is_refused(tmp_path):
    networks()["bert"].save_pretrained(tmp_path)  # 40 rows
    packaged_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"word 'tomato': expected pieces .* rows for"):
        token_rows.token_vectors(tmp_path, ["tomato"])
    with pytest.raises(InputError, match=r"word '\\u200b': .* found \[\]"):
        token_rows.token_vectors(packaged_folder(), ["\u200b"])


def test_where_the_network_of_an_encoder_is(tmp_path):
    folder = tiny_encoder(tmp_path)
    assert token_rows.has_token_rows(folder)
    home = token_rows.transformer_home(folder)
    rows = token_rows.input_embeddings(home)
    assert rows.shape == (30522, 32)
    nested = tmp_path / "nested"
    (nested / "0_Transformer").mkdir(parents=True)
    listed = nested / "modules.json"
    listed.write_text(json.dumps([{"idx": 0, "path": "0_Transformer"}]))
    assert token_rows.transformer_home(nested) == (nested / "0_Transformer").resolve()
    listed.write_text(json.dumps([{"idx": 0, "path": "../tiny"}]))
    assert token_rows.transformer_home(nested) == nested
    assert not token_rows.has_token_rows(nested)  # no network
    listed.write_text("[]")
    with pytest.raises(ModelError, match="list of modules"):
        token_rows.transformer_home(nested)
    assert token_rows.tokenizer_home("all-MiniLM-L6-v2") == packaged_folder().resolve()
