"""A small Llama in training, with the windows that it sees laid open."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from prunery import PruningTrainerMixin
from prunery.pruners.contract import Budget, Selection, Signals

VOCABULARY = 97
IGNORE = -100


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
        attention_dropout=0.0,
    )
    return LlamaForCausalLM(config)


def chats(count: int = 24, seed: int = 0, **columns: list) -> list[dict]:
    """Samples of 6 to 20 tokens: a prompt of 3, an answer, an end."""
    draw = np.random.default_rng(seed)
    made = []
    for number in range(count):
        answer = draw.integers(3, VOCABULARY, int(draw.integers(2, 16))).tolist()
        ids = [1, *draw.integers(3, VOCABULARY, 2).tolist(), *answer, 2]
        row = {
            "id": number * 7,
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": [IGNORE] * 3 + ids[3:],
        }
        made.append(row | {name: values[number] for name, values in columns.items()})
    return made


class Padding:
    """A collator of token lists, padded on the right (or left)."""

    def __init__(self, left: bool = False) -> None:
        self.left = left

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        fills = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE}
        made = {}
        for name, fill in fills.items():
            lines = []
            for row in rows:
                assert set(row) == set(fills), "side columns never reach the collator"
                rest = [fill] * (width - len(row[name]))
                lines.append(rest + row[name] if self.left else row[name] + rest)
            made[name] = torch.tensor(lines)
        return made


def arguments(folder, **options) -> TrainingArguments:
    given = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(**(given | options))


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Keeps what a function of (sample, position, loss) says; remembers what it was asked."""

    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "sample", "token_position", "turn", "loss"})
    optional: ClassVar[frozenset[str]] = frozenset({"protected"})
    budget: ClassVar[Budget] = Budget("share", "fraction")
    scope: ClassVar[str] = "table"
    group: ClassVar[None] = None
    share: float = 1.0
    rule: object = None
    asked: list = field(default_factory=list, repr=False)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        self.asked.append((signals, seed))
        rule = self.rule or (lambda sample, position: np.ones(len(sample), bool))
        keep = np.asarray(rule(signals["sample"], signals["token_position"]), bool)
        return Selection(
            keep, keep.astype(np.float32), (~keep).astype(np.uint8), ("chosen", "not_chosen")
        )


class WatchedMixin(PruningTrainerMixin):
    """Remembers the windows that it trains on."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.windows: list[list[dict]] = []
        self.counts: list[float] = []
        self.losses: list[float] = []

    def get_batch_samples(self, *args):
        batches, count = super().get_batch_samples(*args)
        self.windows.append(batches)
        self.counts.append(float(count))
        self.losses.append(0.0)
        return batches, count

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses[-1] += float(loss)
        return loss


class Watched(WatchedMixin, Trainer):
    pass


def trainer(folder, rows, selection, *, kind=Watched, model=None, left=False, **options):
    return kind(
        model=model or llama(),
        args=arguments(folder, **options),
        train_dataset=rows,
        data_collator=Padding(left),
        selection=selection,
    )


def weights(model) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def same_weights(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses_of(model, rows) -> dict[int, np.ndarray]:
    """Loss of every token of every row, by the definition; index 0 is never predicted."""
    found = {}
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            scores = model(ids).logits[0].double().log_softmax(-1)
        values = -scores[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy()
        found[row["id"]] = np.concatenate([[np.nan], values])
    return found


def trainable(row) -> np.ndarray:
    """Places of the row's targets."""
    return np.flatnonzero(np.array(row["labels"]) != IGNORE)


def trained_rows(window) -> list[tuple[tuple[int, ...], np.ndarray]]:
    """(tokens, places trained) of each row of a window that trains something."""
    found = []
    for batch in window:
        for ids, mask, labels in zip(
            batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
        ):
            kept = np.flatnonzero(labels[mask.bool()].numpy() != IGNORE)
            if len(kept):
                found.append((tuple(ids[mask.bool()].tolist()), kept))
    return found


class Weighing(Chosen):
    """Every other sample counts thrice, every fifth goes."""

    unit = "sample"
    needs = frozenset({"id", "answer_loss"})
    budget = Chosen.budget

    def __call__(self, signals, *, seed):
        number = signals["id"] // 7
        keep = number % 5 != 0
        weight = np.where(keep, np.where(number % 2 == 0, 3.0, 1.0), 0.0).astype(np.float32)
        return Selection(
            keep,
            weight,
            (~keep).astype(np.uint8),
            ("stays", "goes"),
            weight=weight,
        )


def weighed_loss(model, rows, window) -> float:
    """What a window of `Weighing` should cost: weighted sum over the sum of the weights."""
    truth = losses_of(model, rows)
    by_tokens = {tuple(row["input_ids"]): row for row in rows}
    total = mass = 0.0
    for ids, kept in trained_rows(window):
        number = by_tokens[ids]["id"] // 7
        assert number % 5, "every fifth goes"
        weight = 3.0 if number % 2 == 0 else 1.0
        total += weight * truth[number * 7][kept].sum()
        mass += weight * len(kept)
    return total / mass
