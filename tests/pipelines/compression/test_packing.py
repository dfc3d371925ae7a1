import json
import resource

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from prunery.errors import InputError, ModelError, StoreError
from prunery.pipelines.compression import packing
from prunery.pipelines.compression.model_sizes import part_of, sizes_of, two_of_four
from prunery.pipelines.compression.packed_codes import pack
from prunery.pipelines.compression.packing import PackOptions, bits_by_name, pack_model
from prunery.pruners.models.block_layouts import LAYOUTS

from ...tiny_causal import saved_model
from .model_rows import config_of, matrices, pruned, quantise

LLAMA = LAYOUTS["llama"]


def logits(folder):
    config = config_of(folder)
    if "quantization_config" in config:
        pytest.importorskip("compressed_tensors")
    auto = AutoModelForMaskedLM if config["model_type"] == "bert" else AutoModelForCausalLM
    model = auto.from_pretrained(folder)
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def test_bits_stand_side_by_side():
    # 3 bits, shifted by 4: 0..7 are 000 001 ... 111, the lowest first.
    made = pack(torch.arange(-4, 4, dtype=torch.int8)[None], 3)
    assert made.tolist() == [[sum(value << 3 * place for place, value in enumerate(range(8)))]]
    # 4 bits, shifted by 8: eight to a word, and a ninth begins another.
    made = pack(torch.tensor([[-8, -7, 7, 0, 0, 0, 0, -1, 1]], dtype=torch.int8), 4)
    first = sum(value << 4 * place for place, value in enumerate([0, 1, 15, 8, 8, 8, 8, 7]))
    assert made.tolist() == [[first, 9]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", [1, 31, 40, 64])
def test_the_loaders_package_reads_what_was_packed(bits, columns):
    theirs = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    rng = np.random.default_rng(bits)
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (300, columns), np.int8)
    made = pack(torch.from_numpy(codes), bits)
    read = theirs.unpack_from_int32(made, bits, torch.Size(codes.shape))
    assert np.array_equal(read.numpy(), codes)


CASES = [
    ("llama", 4, 16, True),
    ("llama_tied", 4, 0, False),
    ("qwen3", 8, 8, True),
    ("opt", 3, 16, False),
    ("bert", 2, 16, True),
    ("mixtral", 4, 16, True),
    ("qwen2_moe", 4, 16, True),
]


@pytest.mark.parametrize(("name", "bits", "group", "symmetric"), CASES)
def test_packed_models_load_and_answer_as_their_dense_form(tmp_path, name, bits, group, symmetric):
    folder = quantise(saved_model(tmp_path, name), bits, group, symmetric=symmetric)
    report = pack_model(folder, tmp_path / "out")
    assert report.packed == len(matrices(folder))
    torch.testing.assert_close(logits(tmp_path / "out"), logits(folder), rtol=0, atol=1e-6)
    # codes and a float32 scale a group, within the words that rows are padded to
    matrix = report.after.parts["attention"]
    per_weight = bits / 8 + 4 / (group or 32)
    assert matrix.bytes / matrix.parameters < per_weight + 0.35
    assert report.after.file_bytes < 0.75 * report.before.file_bytes
    assert not list((tmp_path / "out").glob("codes-*"))


def test_mixed_bits_have_a_group_each(tmp_path):
    folder = saved_model(tmp_path, "llama")
    quantise(folder, lambda name: 8 if "down_proj" in name else 4, 16)
    by_module = {f"self_attn.{one}_proj": 4 for one in "qkvo"}
    by_module |= {"mlp.up_proj": 4, "mlp.gate_proj": 4, "mlp.down_proj": 8}
    rows = [
        {"layer": layer, "module": module, "unit": "weight", "kept": 1, "bits": bits}
        for layer in range(3)
        for module, bits in by_module.items()
    ]
    names = [name.removesuffix(".weight") for name in matrices(folder)]
    bits = bits_by_name(rows, names, LLAMA)
    assert set(bits) == set(names)
    report = pack_model(folder, tmp_path / "out", PackOptions(bits=bits))
    assert report.packed == len(names)
    groups = config_of(tmp_path / "out")["quantization_config"]["config_groups"]
    assert [group["weights"]["num_bits"] for group in groups.values()] == [4, 8]
    assert config_of(tmp_path / "out")["quantization_config"]["ignore"] == ["lm_head"]
    torch.testing.assert_close(logits(tmp_path / "out"), logits(folder), rtol=0, atol=1e-6)


def test_zero_points_go_with_one_kind_of_grid_alone(tmp_path):
    folder = saved_model(tmp_path, "llama")
    quantise(folder, lambda name: 8 if "down_proj" in name else 4, 16, symmetric=False)
    bits = {
        name.removesuffix(".weight"): 8 if "down_proj" in name else 4 for name in matrices(folder)
    }
    report = pack_model(folder, tmp_path / "out", PackOptions(bits=bits))
    assert report.packed == 0
    assert torch.equal(logits(tmp_path / "out"), logits(folder))


def test_groups_of_unequal_length_stay_dense(tmp_path):
    folder = quantise(saved_model(tmp_path, "llama"), 4, 16)
    codes = load_file(folder / "codes-00000.safetensors")
    name = "model.layers.0.mlp.up_proj.scale"  # 32 inputs in 3 groups
    codes[name] = torch.cat([codes[name], codes[name][:, :1]], 1)
    save_file(codes, folder / "codes-00000.safetensors")
    report = pack_model(folder, tmp_path / "out")
    assert report.packed == len(matrices(folder)) - 1
    assert "model.layers.0.mlp.up_proj" in report.notes[0]
    torch.testing.assert_close(logits(tmp_path / "out"), logits(folder), rtol=0, atol=1e-6)


def test_rows_count_layers_as_they_were_before_some_were_dropped():
    rows = [
        {"layer": 1, "module": "", "unit": "layer", "kept": 0, "bits": None},
        {"layer": 0, "module": "mlp.up_proj", "unit": "weight", "kept": 9, "bits": 4},
        {"layer": 2, "module": "mlp.up_proj", "unit": "weight", "kept": 9, "bits": 8},
    ]
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in range(2)]
    assert bits_by_name(rows, names, LLAMA) == {names[0]: 4, names[1]: 8}
    # A dropped layer has no place among those that stay, whatever its rows say of its matrices.
    rows.append({"layer": 1, "module": "mlp.up_proj", "unit": "weight", "kept": 9, "bits": 2})
    assert bits_by_name(rows, names, LLAMA) == {names[0]: 4, names[1]: 8}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("gpt2", {"transposed": True}),  # its matrices are no linear modules
        ("mixtral", {"symmetric": False}),  # stacked experts have no zero points
    ],
)
def test_what_no_loader_takes_stays_dense_and_is_said(tmp_path, name, how):
    folder = quantise(saved_model(tmp_path, name), 4, 16, **how)
    report = pack_model(folder, tmp_path / "out")
    assert report.packed == 0
    assert "quantization_config" not in config_of(tmp_path / "out")
    assert any("did not fall" in note for note in report.notes)
    assert torch.equal(logits(tmp_path / "out"), logits(folder))


def test_experts_of_two_kinds_of_grid_stay_dense(tmp_path):
    folder, wide = saved_model(tmp_path, "mixtral"), "self_attn"
    quantise(folder, lambda name: 8 if wide in name else 4, 16)
    names = [name.removesuffix(".weight") for name in matrices(folder)]
    bits = {name: 8 if wide in name else 4 for name in names}
    assert pack_model(folder, tmp_path / "out", PackOptions(bits=bits)).packed == 0
    assert torch.equal(logits(tmp_path / "out"), logits(folder))
    alike = pack_model(folder, tmp_path / "alike", PackOptions(bits=dict.fromkeys(names, 8)))
    assert alike.packed == len(names)


def test_codes_that_need_more_bits_than_the_table_says_are_refused(tmp_path):
    folder = quantise(saved_model(tmp_path, "llama"), 8, 16)
    bits = {name.removesuffix(".weight"): 4 for name in matrices(folder)}
    with pytest.raises(ModelError, match=r"expected codes of 4 bits, found some that need 8"):
        pack_model(folder, tmp_path / "out", PackOptions(bits=bits))
    assert not (tmp_path / "out").exists()


def test_masks_live_through_and_the_report_says_what_they_save(tmp_path):
    folder = pruned(saved_model(tmp_path, "llama"), tmp_path / "sparse", 0.5, seed=None)
    report = pack_model(folder, tmp_path / "out")
    assert report.after.share_zero == 0.5
    total = report.after.total
    assert total.weights == sum(
        load_file(folder / "model.safetensors")[n].numel() for n in matrices(folder)
    )
    # float32: a value is 4 bytes, so half the values and a bit a place are 17 of 32
    saved = total.bytes - report.after.bitmask_bytes
    assert saved == total.weights * 4 - (total.weights * 2 + total.weights // 8)
    assert report.after.pairs_bytes is None
    assert any("50.0% of the layers' weights are 0" in note for note in report.notes)
    assert any("The size on disk did not fall." in note for note in report.notes)
    for name, tensor in load_file(folder / "model.safetensors").items():
        packed = {}
        for path in (tmp_path / "out").glob("model-*.safetensors"):
            packed |= load_file(path)
        assert torch.equal(packed[name], tensor)


def test_two_of_four():
    weight = torch.tensor([[1.0, 0, 2, 0, 0, 0, 0, 3], [0, 0, 0, 0, 1, 2, 0, 0]])
    assert two_of_four(weight)
    weight[0, 1] = 1
    assert not two_of_four(weight)
    assert not two_of_four(torch.zeros(2, 6))


def test_pairs_are_counted_where_every_four_inputs_have_two(tmp_path):
    folder = saved_model(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    for name in matrices(folder):
        tensors[name] = tensors[name] * torch.tensor([1.0, 0, 0, 1]).repeat(
            tensors[name].shape[1] // 4
        )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = sizes_of(folder, LLAMA)
    weights = found.total.weights
    # half the values, and 2 bits for each of them
    assert found.total.bytes - found.pairs_bytes == weights * 2 - weights // 8
    report = pack_model(folder, tmp_path / "out")
    assert any("2:4" in note for note in report.notes)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_narrower_dtype_halves_the_file(tmp_path, dtype):
    folder = saved_model(tmp_path, "llama")
    report = pack_model(folder, tmp_path / "out", PackOptions(dtype=dtype, dense=folder))
    assert report.after.total.bytes * 2 == report.before.total.bytes
    assert config_of(tmp_path / "out")["dtype"] == dtype
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == getattr(torch, dtype)


def test_a_weight_beyond_float16_is_refused_by_name(tmp_path):
    folder = saved_model(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.norm\.weight: expected weights that float16"):
        pack_model(folder, tmp_path / "out", PackOptions(dtype="float16"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


@pytest.mark.parametrize("dtype", ["source", "bfloat16"])
@pytest.mark.parametrize("poison", [float("nan"), float("-inf")])
def test_a_weight_that_is_no_number_is_refused_by_name(tmp_path, dtype, poison):
    folder = saved_model(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][3, 5] = poison
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.2\.mlp\.down_proj\.weight: expected finite"):
        pack_model(folder, tmp_path / "out", PackOptions(dtype=dtype))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


def test_a_folder_that_exists_is_never_overwritten(tmp_path):
    folder, out = saved_model(tmp_path, "llama"), tmp_path / "out"
    out.mkdir()
    with pytest.raises(InputError, match=r"out: expected a folder that does not exist"):
        pack_model(folder, out)
    assert not list(out.iterdir())


def test_a_disk_that_fills_leaves_nothing_behind(tmp_path):
    folder = saved_model(tmp_path, "llama")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    out = tmp_path / "exports" / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        with pytest.raises(StoreError) as found:
            pack_model(folder, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"{out}: expected to write the model there" in str(found.value)
    assert "the disk is full (or a limit is reached)" in str(found.value)
    assert not list(out.parent.iterdir())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_another_failure_to_write_names_the_folder(tmp_path, monkeypatch):
    def fail(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(packing, "write_model", fail)
    with pytest.raises(StoreError, match=r"out: expected to write .* mend that and run again"):
        pack_model(saved_model(tmp_path, "llama"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_parts_of_every_architecture_add_up(tmp_path):
    for name in ("llama", "gpt2", "opt", "bert", "mixtral", "qwen2_moe"):
        folder = saved_model(tmp_path, name)
        layout = LAYOUTS[name]
        tensors = load_file(folder / "model.safetensors")
        found = sizes_of(folder, layout)
        assert found.total.parameters == sum(tensor.numel() for tensor in tensors.values())
        for part in ("attention", "feed-forward", "norms", "outside the layers"):
            assert found.parts[part].parameters > 0, (name, part)
        assert found.total.weights >= sum(tensors[one].numel() for one in matrices(folder))
    assert part_of("transformer.h.0.attn.c_attn.bias", LAYOUTS["gpt2"]) == "attention"
    assert part_of("bert.encoder.layer.1.output.dense.weight", LAYOUTS["bert"]) == "feed-forward"
    assert part_of("lm_head.weight", LLAMA) == "outside the layers"


def test_the_report_is_json(tmp_path):
    report = pack_model(saved_model(tmp_path, "llama"), tmp_path / "out")
    made = json.loads(json.dumps(report.to_dict()))
    assert made["after"]["parts"]["attention"]["parameters"] > 0
