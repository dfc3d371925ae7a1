"""Prompts a second: black boxes against a loop over prompts through stock transformers.

    python benchmarks/prompt_speed.py
    python benchmarks/prompt_speed.py --models llama --prompts 500

The loop is what a careful user writes: one padded batch of all rows a prompt, without gradients
and, for a causal model, with `logits_to_keep=1`; for a sentence encoder what holds no prompt is
encoded once. It is timed on the first prompts, on which the answers are compared too. Prompts are
asked all at once, and (`calls of 16`) 16 at a time, as a search with the default options asks.

Models: stories260K with stories (skipped where the shared data are missing); a Llama and a BERT
of random weights with tokenizers trained on the help texts of Python; the packaged
all-MiniLM-L6-v2 as a sentence encoder. Writes `results/prompt_speed.json` and a section of
`RESULTS.md`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fresh
import numpy as np
import torch
from sections import write_section

from prunery.pipelines.models import encoder, sentence_encoder
from prunery.pipelines.train_lm import train_tokenizer
from prunery.pruners.signals.black_box import BlackBox, Template
from prunery.pruners.signals.causal_labels import CausalLabels
from prunery.pruners.signals.encoder_labels import TEMPERATURE, EncoderLabels
from prunery.pruners.signals.masked_labels import MaskedLabels

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent.parent / "shared" / "data"
CALL = 16  # prompts of one call of a search: 1,024 queries of 64 rows
Ask = Callable[[str], np.ndarray]
Count = Callable[[str], int]
# Ours, theirs, rows, words for prompts, tokens of a text.
Case = tuple[BlackBox, Ask, list[str], list[str], Count]


def help_texts() -> list[str]:
    """Paragraphs of Python's help on its topics."""
    from pydoc_data.topics import topics

    return [part for text in topics.values() for part in text.split("\n\n") if len(part) > 60]


def distinct(texts: list[str]) -> list[str]:
    """Words of the texts, the most frequent first."""
    found = re.findall(r"[A-Za-z]{2,}", " ".join(texts))
    names, counts = np.unique([word.lower() for word in found], return_counts=True)
    return [str(names[place]) for place in np.lexsort((names, -counts))]


def some_rows(texts: list[str], count: int, tokens: Count, seed: int) -> list[str]:
    """Rows of 40 to 80 tokens, each from a text of its own."""
    draw = np.random.default_rng(seed)
    made = []
    for place in draw.permutation(len(texts)):
        words = texts[place].split()
        size = int(draw.integers(40, 81))
        row = ""
        for count_words in range(1, len(words) + 1):
            longer = " ".join(words[:count_words])
            if tokens(longer) > size:
                break
            row = longer
        if tokens(row) >= 40:
            made.append(row)
        if len(made) == count:
            return made
    raise SystemExit(f"only {len(made)} texts are long enough")


def count_with(tokenizer: Any) -> Count:
    """Tokens that a text has for a tokenizer."""
    return lambda text: len(tokenizer(text, verbose=False)["input_ids"])


def stories(given: argparse.Namespace) -> Case | None:
    """The 260 thousand parameters that tell stories, with the prompt after the text."""
    from prunery.tests.pruners.signals.stories260k import fast_tokenizer, load_stories

    folder = SHARED / "ckpt_stories260K"
    file = SHARED / "lm_tinystories" / "tinystories_sample.first80pct.txt.gz"
    if not folder.is_dir() or not file.is_file():
        return None
    model = load_stories(folder / "stories260K.bin")
    tokenizer = fast_tokenizer(folder / "tok512.bin", model.config.vocab_size)
    tokenizer.pad_token = "</s>"
    with gzip.open(file, "rt", encoding="utf-8") as opened:
        texts = [text.strip() for text in opened.read(600_000).split("<|endoftext|>")]
    return causal(model, tokenizer, ["happy", "sad"], [text for text in texts if text], given)


def llama(given: argparse.Namespace) -> Case:
    """A Llama of a middling size, random weights, the prompt after the text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    texts = help_texts()
    tokenizer = train_tokenizer(texts, 8000)
    torch.manual_seed(given.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=given.hidden,
        intermediate_size=given.hidden * 11 // 4,
        num_hidden_layers=6,
        num_attention_heads=given.hidden // 64,
        num_key_value_heads=given.hidden // 64,
        initializer_range=0.05,
    )
    model = LlamaForCausalLM(config).eval()
    return causal(model, tokenizer, ["true", "false"], texts, given)


def causal(
    model: Any, tokenizer: Any, words: list[str], texts: list[str], given: argparse.Namespace
) -> Case:
    """Ours and the loop for a causal model."""
    template = Template("{text} {prompt}")
    rows = some_rows(texts, given.rows, count_with(tokenizer), given.seed)
    box = CausalLabels(model, tokenizer, words, template=template, label_tokens="first")
    start = tokenizer("x")["input_ids"]
    ids = [tokenizer(f"x {word}")["input_ids"][len(start)] for word in words]

    def loop(prompt: str) -> np.ndarray:
        batch = tokenizer(
            [template.render(prompt=prompt, text=row) for row in rows],
            padding=True,
            padding_side="left",
            return_tensors="pt",
            return_token_type_ids=False,
        )
        with torch.inference_mode():
            logits = model(**batch, logits_to_keep=1, use_cache=False).logits
        return torch.log_softmax(logits[:, -1, ids], -1).numpy()

    return box, loop, rows, distinct(texts), count_with(tokenizer)


def bert(given: argparse.Namespace) -> Case:
    """A BERT of a middling size, random weights, the packaged encoder's tokenizer."""
    from transformers import BertConfig, BertForMaskedLM

    from prunery.pruners.models.tokenizers import load_tokenizer

    texts, words = help_texts(), ["true", "false"]
    tokenizer = load_tokenizer(encoder("all-MiniLM-L6-v2").path)
    torch.manual_seed(given.seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=given.hidden,
        num_hidden_layers=6,
        num_attention_heads=given.hidden // 64,
        intermediate_size=4 * given.hidden,
        initializer_range=0.05,
    )
    model = BertForMaskedLM(config).eval()
    template = Template("{text} {prompt} {mask} .")
    rows = some_rows(texts, given.rows, count_with(tokenizer), given.seed)
    box = MaskedLabels(model, tokenizer, words, template=template, label_tokens="first")
    ids = tokenizer.convert_tokens_to_ids(words)

    def loop(prompt: str) -> np.ndarray:
        batch = tokenizer(
            [template.render(prompt=prompt, text=row, mask=tokenizer.mask_token) for row in rows],
            padding=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            logits = model(**batch).logits
        at = batch["input_ids"] == tokenizer.mask_token_id
        return torch.log_softmax(logits[at][:, ids], -1).numpy()

    return box, loop, rows, distinct(texts), count_with(tokenizer)


def sentences(given: argparse.Namespace, *, in_text: bool) -> Case:
    """The packaged sentence encoder, the prompt in the text or in the labels."""
    texts, words = help_texts(), ["statement", "expression", "class", "module"]
    model = sentence_encoder(str(encoder("all-MiniLM-L6-v2").path), "cpu")

    def count(text: str) -> int:
        return int(model.count_tokens([text])[0])

    rows = some_rows(texts, given.rows, count, given.seed)
    template = Template("{text} {prompt}" if in_text else "{text}")
    labels = Template("{label}" if in_text else "{prompt} {label}")
    box = EncoderLabels(
        model.encode, model.count_tokens, words, template=template, label_template=labels
    )
    fixed = model.encode(words if in_text else rows)

    def loop(prompt: str) -> np.ndarray:
        if in_text:
            read = model.encode([template.render(prompt=prompt, text=row) for row in rows])
            cosine = read @ fixed.T
        else:
            read = model.encode([labels.render(prompt=prompt, label=word) for word in words])
            cosine = fixed @ read.T
        return torch.log_softmax(torch.from_numpy(cosine / TEMPERATURE), -1).numpy()

    return box, loop, rows, distinct(texts), count


CASES: dict[str, Callable[[argparse.Namespace], Case | None]] = {
    "stories260k": stories,
    "llama": llama,
    "bert": bert,
    "encoder, text": lambda given: sentences(given, in_text=True),
    "encoder, labels": lambda given: sentences(given, in_text=False),
}


def prompts_of(words: list[str], count: int, length: int, seed: int) -> list[str]:
    """Prompts of that many words: the most frequent words, or random ones."""
    if length == 1:
        return words[:count]
    draw = np.random.default_rng(seed).integers(0, len(words), (count, length))
    return [" ".join(words[place] for place in line) for line in draw]


def measure(name: str, cases: list[Case], length: int, given: argparse.Namespace) -> dict[str, Any]:
    """Prompts a second of ours and of the loop, and how far their answers are apart.

    Each of the cases is the same model in a new box, so that nothing is known from the one before:
    ours has a rate of each, the loop one of each prompt.
    """
    case = cases[0]
    box, loop, rows, words, tokens = case
    alone = name in ("bert", "encoder, text")  # nothing is shared: few prompts say as much
    loops = max(1, given.loop // 2) if alone else given.loop
    count = loops if alone else min(given.prompts, len(words))
    count = count if length == 1 else max(loops, count // 10)
    prompts = prompts_of(words, count, length, given.seed)
    first, some = prompts[:loops], prompts[: 10 * CALL]
    loop(first[0])
    box.label_logprobs(first[:2], rows[:2])
    answers, each = [], []
    for prompt in first:
        began = time.perf_counter()
        answers.append(loop(prompt))
        each.append(1 / (time.perf_counter() - began))
    theirs = np.stack(answers)
    loop_rate = len(each) / sum(1 / rate for rate in each)
    rates = []
    for number, (again, *_) in enumerate(cases):
        if number:
            again.label_logprobs(first[:2], rows[:2])
        began = time.perf_counter()
        ours = again.label_logprobs(prompts, rows)
        rates.append(len(prompts) / (time.perf_counter() - began))
    gap = float(np.abs(ours[: len(first)] - theirs).max())
    assert gap < given.gap, (name, gap)
    calls_seconds = None
    if not alone:
        began = time.perf_counter()
        calls = [box.label_logprobs(some[at : at + CALL], rows) for at in range(0, len(some), CALL)]
        calls_seconds = time.perf_counter() - began
        assert float(np.abs(np.concatenate(calls) - ours[: len(some)]).max()) < given.gap
    return {
        "model": name,
        "words": length,
        "rows": len(rows),
        "row_tokens": float(np.mean([tokens(row) for row in rows])),
        "prompt_tokens": float(np.mean([tokens(f"x {one}") - tokens("x") for one in prompts])),
        "prompts": len(prompts),
        "loop_prompts": len(first),
        "ours": float(np.median(rates)),
        "ours_range": [min(rates), max(rates)],
        "calls": len(some) / calls_seconds if calls_seconds else None,
        "loop": loop_rate,
        "loop_range": [float(np.percentile(each, q)) for q in (10, 90)],
        "gap": gap,
    }


def _range(middle: float, ends: list[float]) -> str:
    return f"{middle:.3g} [{ends[0]:.3g}, {ends[1]:.3g}]"


def section(made: dict[str, Any]) -> str:
    """The table for RESULTS.md."""
    where = made["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    lines = [
        "## Prompts a second",
        "",
        f"`{made['command']}`",
        "",
        f"{where['processor']}, {where['threads']} threads, Python {where['python']}, {versions};"
        f" load average before {where['load_before']:.1f}. Float32. One prompt is asked on all"
        " rows. The loop sends a padded batch of all rows a prompt through stock transformers;"
        " it is timed on the first prompts, on which answers are compared (largest difference of"
        " a log probability, nats). Brackets: the 10th and 90th percentile of the loop's prompts;"
        f" the slowest and fastest of {made['repeats']} runs of ours, each in a new black box, with"
        " the median before them. `calls of 16`: ours, asked 16 prompts at a time, as a search"
        " asks. Llama and BERT have random weights.",
        "",
        "| Model | Words a prompt | Tokens a row, a prompt | Prompts, in the loop | Loop, prompts/s"
        " | Ours, prompts/s | Times | Calls of 16, prompts/s | Times | Difference |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in made["cases"]:
        calls = one["calls"]
        asked = f"{calls:.1f} | {calls / one['loop']:.1f}" if calls else " | "
        lines.append(
            f"| {one['model']} | {one['words']} | {one['row_tokens']:.0f},"
            f" {one['prompt_tokens']:.1f} | {one['prompts']}, {one['loop_prompts']} |"
            f" {_range(one['loop'], one['loop_range'])} | {_range(one['ours'], one['ours_range'])}"
            f" | {one['ours'] / one['loop']:.1f} | {asked}"
            f" | {one['gap']:.0e} |"
        )
    lines += [
        "",
        "The prompt stands after the text in causal models: the text is read once for all prompts,"
        " so the gain is about (row + prompt) / prompt in tokens, more where prompts begin alike;"
        " a vocabulary of 512 spells five words in 22. In BERT and in the encoder's text nothing"
        " can be shared: what is gained there is batches of even lengths, and an output layer that"
        " sees masks alone. In the encoder's labels the loop too encodes the rows once.",
    ]
    lines += [f"\nSkipped, data missing: {', '.join(made['skipped'])}."] if made["skipped"] else []
    return "\n".join(lines)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--loop", type=int, default=30, help="prompts of the loop")
    parser.add_argument("--repeats", type=int, default=3, help="runs of ours")
    parser.add_argument("--models", default=",".join(CASES).replace(", ", " "))
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gap", type=float, default=1e-3)
    parser.add_argument("--dry", action="store_true", help="print, write nothing")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    where = fresh.machine("cpu", given.threads, ("torch", "transformers", "tokenizers"))
    cases, skipped = [], []
    for name, make in CASES.items():
        if name.replace(", ", " ") not in given.models.split(","):
            continue
        if make(given) is None:
            skipped.append(name)
            continue
        for length in (1, 5):
            fresh_boxes = [case for case in (make(given) for _ in range(given.repeats)) if case]
            cases.append(measure(name, fresh_boxes, length, given))
            print(json.dumps(cases[-1]), flush=True)
    made = {
        "command": fresh.command(__file__),
        "machine": where,
        "options": vars(given),
        "repeats": given.repeats,
        "cases": cases,
        "skipped": skipped,
    }
    if not given.dry:
        file = HERE / "results" / "prompt_speed.json"
        file.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        write_section(HERE / "RESULTS.md", "prompt-speed", section(made))
    print(section(made))


if __name__ == "__main__":
    main()
