"""Wanda, SparseGPT, GPTQ by llm-compressor and magnitude by torch-pruning, timed in a process.

Called by `compression_speed.py` with the interpreter of an environment that holds the peers
(`pip install llmcompressor torch-pruning`); it imports nothing of ours. Rows of token ids come as
an .npy file, the model as a folder; the compressed model is saved for us to judge.

    python benchmarks/compression_peers.py wanda MODEL ROWS.npy OUT [--sparsity 0.5] [--threads 2]

Prints one line of JSON: seconds of the call alone, peak memory of the process, versions.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np


def main() -> None:
    """Run one method and print what it took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=["wanda", "sparsegpt", "gptq", "torch_pruning"])
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("out")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--group", type=int, default=0, help="inputs that share a scale; 0: a row")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM

    # What is imported on the way is imported before the clock starts, as with ours.
    if args.method == "torch_pruning":
        import torch_pruning  # noqa: F401
    else:
        import llmcompressor.modifiers.pruning
        import llmcompressor.modifiers.quantization  # noqa: F401

    torch.set_num_threads(args.threads)
    rows = np.load(args.rows)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    before = peak_bytes(reset=True)
    start, used = time.perf_counter(), time.process_time()
    if args.method == "torch_pruning":
        _torch_pruning(model, rows, args.sparsity)
    else:
        _llm_compressor(model, rows, args)
    seconds, used = time.perf_counter() - start, time.process_time() - used
    peak = peak_bytes()
    model.to("cpu")
    if args.method != "torch_pruning":
        _save(model, Path(args.out))
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu_seconds": used,
                "peak_bytes": peak,
                "before_bytes": before,
                "versions": {name: _version(name) for name in _PACKAGES},
            }
        )
    )


def peak_bytes(*, reset: bool = False) -> int:
    """The most memory that this process has held since its start or the last reset, in bytes.

    Not `getrusage`: its figure is never below what the parent held when it started the process.
    """
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("expected VmHWM in /proc/self/status, found none. Run this on Linux.")


_PACKAGES = ("llmcompressor", "torch-pruning", "compressed-tensors", "torch", "transformers")


def _version(name: str) -> str:
    try:
        return version(name)
    except Exception:  # noqa: BLE001
        return ""


def _llm_compressor(model: object, rows: np.ndarray, args: argparse.Namespace) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from llmcompressor.modifiers.quantization import GPTQModifier

    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": np.ones_like(rows)})
    # Wanda and SparseGPT name no layers: by default every linear layer but the output layer.
    made = {
        "wanda": lambda: WandaPruningModifier(
            sparsity=args.sparsity, mask_structure="0:0", ignore=["re:.*lm_head"]
        ),
        "sparsegpt": lambda: SparseGPTModifier(
            sparsity=args.sparsity, mask_structure="0:0", ignore=["re:.*lm_head"]
        ),
        "gptq": lambda: GPTQModifier(
            targets="Linear",
            ignore=["lm_head"],
            config_groups={
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 4,
                        "type": "int",
                        "symmetric": True,
                        "strategy": "group" if args.group else "channel",
                        **({"group_size": args.group} if args.group else {}),
                    },
                }
            },
        ),
    }[args.method]()
    oneshot(
        model=model,
        dataset=data,
        recipe=made,
        max_seq_length=rows.shape[1],
        num_calibration_samples=len(rows),
        pipeline="sequential",
    )


def _torch_pruning(model: object, rows: np.ndarray, sparsity: float) -> None:
    import torch
    import torch_pruning as tp

    model.config.use_cache = False  # type: ignore[attr-defined]
    heads = {}
    for layer in model.model.layers:  # type: ignore[attr-defined]
        for name in ("q_proj", "k_proj", "v_proj"):
            module = getattr(layer.self_attn, name)
            heads[module] = module.out_features // layer.self_attn.head_dim
    pruner = tp.pruner.BasePruner(
        model,
        # It walks the graph of this example back: 16 tokens couple what 256 do.
        example_inputs=torch.from_numpy(rows[:1, :16]),
        output_transform=lambda out: out.logits,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=sparsity,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=sparsity,
        ignored_layers=[model.lm_head],  # type: ignore[attr-defined]
        root_module_types=[torch.nn.Linear],
    )
    pruner.step()


def _save(model: object, folder: Path) -> None:
    """The plain weights: quantised ones as the numbers they stand for."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()  # type: ignore[attr-defined]
        if name.endswith((".weight", ".bias")) and "lm_head" not in name
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
