"""A deep random Llama written block by block, and the peak memory of a step over it.

Run as a program: `deep_model.py FOLDER` prints, as JSON, the bytes of a layer and of all layers,
and by how many bytes memory grew in a process that walks through the model, in one that makes its
gradients of its first FEW layers, and in one that walks through these and holds their blocks.
"""

import json
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path

FEW = 16  # layers: enough to tell them from the few that may be held
LAYERS, HIDDEN, WIDTH, HEADS, VOCABULARY = 48, 400, 1200, 8, 300
STATISTICS = ["sum_squares", "m2", "weighted_gram", "cosine"]


def layer_shapes(number):
    """Names and shapes of one layer's tensors."""
    inside = f"model.layers.{number}"
    square = dict.fromkeys(
        [f"{inside}.self_attn.{part}_proj.weight" for part in "qkvo"], (HIDDEN, HIDDEN)
    )
    return square | {
        f"{inside}.mlp.gate_proj.weight": (WIDTH, HIDDEN),
        f"{inside}.mlp.up_proj.weight": (WIDTH, HIDDEN),
        f"{inside}.mlp.down_proj.weight": (HIDDEN, WIDTH),
        f"{inside}.input_layernorm.weight": (HIDDEN,),
        f"{inside}.post_attention_layernorm.weight": (HIDDEN,),
    }


def write_model(folder):
    """Write it a layer at a time, as no whole model would fit."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from tests.tiny_causal import tiny_tokenizer

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    outside = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    places = {}
    parts = [outside, *map(layer_shapes, range(LAYERS))]
    for number, shapes in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        made = {
            name: torch.randn(shape, generator=generator) * 0.02
            if len(shape) > 1
            else torch.ones(shape)
            for name, shape in shapes.items()
        }
        save_file(made, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(made, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def token_rows():
    """A few rows of several lengths."""
    import numpy as np

    return [np.arange(3, 3 + length) for length in (20, 12, 9)]


class Enough(Exception):
    pass


def walk_through(folder, work, layers=LAYERS):
    """Statistics of every layer; the journal's files are emptied as they are made."""
    from prunery.pipelines.compression.journal import LayerJournal
    from prunery.pipelines.compression.statistics import layer_statistics, named
    from prunery.pipelines.compression.walk import batches_of, walk
    from prunery.pruners.models.streamed_model import StreamedModel

    model = StreamedModel(folder)
    journal = LayerJournal(work)

    def visit(here):
        found = layer_statistics(here, frozenset(STATISTICS))
        assert all(array.isfinite().all() for array in found.values())
        return named(found), []

    def spare_the_disk(layer):
        journal.file(layer).write_bytes(b"")
        if layer + 1 == layers:
            raise Enough

    batches = batches_of(token_rows(), tokens=40)
    with suppress(Enough):
        walk(model, batches, journal, visit, each_layer=spare_the_disk)


def gradients(folder, work, layers=LAYERS):
    """Gradients of the first layers; the journal's files are emptied as they are made."""
    from prunery.pipelines.compression.gradients import GradientPass
    from prunery.pruners.models.streamed_model import StreamedModel

    def spare_the_disk(layer):
        for path in work.glob("backward/layer-*.safetensors"):
            path.write_bytes(b"")

    model = StreamedModel(folder)
    model.layers = min(layers, model.layers)
    GradientPass(model, token_rows(), work, frozenset({"gradient_square"})).run(spare_the_disk)


def hold_every_block():
    """Make the walk keep all blocks, as a whole model would."""
    from prunery.pruners.models.streamed_model import StreamedModel

    block, held = StreamedModel.block, []
    StreamedModel.block = lambda self, number: held.append(block(self, number)) or held[-1]


def growth(folder, run):
    """By how many bytes this process grew at most while `run` ran (a child does it).

    A child has not yet touched its libraries' pages: a small walk before does.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            warm_up(folder)
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
            before = _status("VmRSS")
            run()
            os.write(writing, str(_status("VmHWM") - before).encode())
        except Exception:  # noqa: BLE001  a child ends here, whatever happened
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        return int(pipe.read())


def _status(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def warm_up(folder):
    """What is imported and set up by any walk is no growth."""
    work = folder / f"warm-{os.getpid()}"
    walk_through(folder / "llama", work / "walk")
    gradients(folder / "llama", work / "back")


def main(folder):
    import faiss  # noqa: F401  before torch

    from tests.tiny_causal import saved_model

    write_model(folder / "model")
    saved_model(folder, "llama")
    size = sum(4 * _product(shape) for shape in layer_shapes(0).values())

    def holding():
        hold_every_block()
        walk_through(folder / "model", folder / "held", FEW)

    found = {
        "layer": size,
        "all": size * LAYERS,
        "few": size * FEW,
        "streamed": growth(folder, lambda: walk_through(folder / "model", folder / "streamed")),
        "gradients": growth(folder, lambda: gradients(folder / "model", folder / "back", FEW)),
        "held": growth(folder, holding),
    }
    sys.stdout.write(json.dumps(found))


def _product(shape):
    made = 1
    for size in shape:
        made *= size
    return made


if __name__ == "__main__":
    main(Path(sys.argv[1]))
