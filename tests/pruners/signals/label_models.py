"""Tiny random language models of three kinds with tokenizers trained on the spot."""

from functools import lru_cache

import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

CORPUS = [
    "a bright and moving film, it was a great delight from start to end",
    "the plot was dull and the acting bad; a terrible waste of time!",
    "good bad great terrible positive negative sport business world science",
    "prices rose by 12 percent in 2019, the bank said. Markets fell again.",
    "It was what it was: classify the review, and answer in one word (please).",
    "the the the of of and and to to in in film film review review answer answer",
]


@lru_cache(maxsize=8)
def _trained(kind: str) -> str:
    if kind == "bytes":  # GPT-2, Qwen, RoBERTa
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True)],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    elif kind == "pieces":  # Llama 2's: no pre-tokenizer, spaces written as ▁
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        trainer = trainers.BpeTrainer(
            vocab_size=476,
            special_tokens=["<unk>", "<s>", "</s>", *[f"<0x{n:02X}>" for n in range(256)]],
            show_progress=False,
        )
    elif kind == "unigram":  # T5's
        made = Tokenizer(models.Unigram())
        made.normalizer = normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Strip(), normalizers.Replace("  ", " ")]
        )
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=160,
            special_tokens=["<pad>", "</s>", "<unk>"],
            unk_token="<unk>",
            show_progress=False,
        )
    else:  # BERT's
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=200,
            special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
            show_progress=False,
        )
    made.train_from_iterator(CORPUS, trainer)
    if kind == "pieces":  # merges within words alone, as they were learnt, but no splitting
        made.pre_tokenizer = None
    return made.to_str()


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """gpt2, qwen2, llama, roberta, bart, t5 or bert: a tokenizer of that make."""
    kind = {"llama": "pieces", "t5": "unigram", "bert": "words", "distilbert": "words"}
    made = Tokenizer.from_str(_trained(kind.get(name, "bytes")))
    special: dict = {}
    if name in ("gpt2", "qwen2"):
        special = {"bos_token": "<s>", "eos_token": "</s>"}
    elif name == "llama":
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    elif name == "t5":
        made.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
        special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    elif name in ("roberta", "bart"):
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
        special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        special["unk_token"] = "<unk>"
        special["mask_token"] = "<mask>"
    else:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
        special |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, clean_up_tokenization_spaces=False, **special
    )


_WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4}
_SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 128,
}

MAKES = {
    "llama": lambda v: LlamaForCausalLM(
        LlamaConfig(vocab_size=v, **_WIDE, **_HEADS, num_key_value_heads=2)
    ),
    "qwen2": lambda v: Qwen2ForCausalLM(
        Qwen2Config(vocab_size=v, **_WIDE, **_HEADS, num_key_value_heads=2)
    ),
    "gpt2": lambda v: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=v,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            bos_token_id=0,
            eos_token_id=2,
        )
    ),
    "bert": lambda v: BertForMaskedLM(BertConfig(vocab_size=v, **_WIDE, **_HEADS)),
    "distilbert": lambda v: DistilBertForMaskedLM(
        DistilBertConfig(vocab_size=v, dim=32, n_layers=2, n_heads=4, hidden_dim=48)
    ),
    "roberta": lambda v: RobertaForMaskedLM(
        RobertaConfig(vocab_size=v, **_WIDE, **_HEADS, max_position_embeddings=130, pad_token_id=1)
    ),
    "t5": lambda v: T5ForConditionalGeneration(
        T5Config(
            vocab_size=v,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        )
    ),
    "bart": lambda v: BartForConditionalGeneration(
        BartConfig(
            vocab_size=v,
            **_SEQ,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=2,
        )
    ),
}


@lru_cache(maxsize=8)
def model_of(name: str, spread: float = 0.15):
    """(model, tokenizer); weights spread enough that answers differ."""
    tokenizer = tokenizer_of(name)
    torch.manual_seed(0)
    model = MAKES[name](len(tokenizer))
    with torch.no_grad():
        for part in model.parameters():
            if part.ndim > 1:
                part.normal_(0, spread)
    if name == "bart":
        model.generation_config.forced_bos_token_id = 0
    return model.eval(), tokenizer
