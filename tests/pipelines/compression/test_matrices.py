import itertools
import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from prunery.errors import InputError
from prunery.pipelines.compression.matrices import METHOD_NAMES, MatrixCompressor, MatrixOptions
from prunery.pipelines.compression.tables import COMPRESSED
from prunery.pruners.catalogue import METHODS
from prunery.pruners.contract import Signals
from prunery.pruners.models.block_layouts import weight_of

from ...tiny_causal import ARCHITECTURES, saved_model
from .layers import inputs_of, plan_of, statistics_of, visit_of

PRUNERS = [name for name in METHOD_NAMES if name != "none"]


def weights(visit):
    """Of all matrices, (out, in)."""
    return {
        matrix.name: weight_of(visit.block.get_submodule(matrix.name), visit.layout).clone()
        for matrix in visit.layout.matrices(visit.block)
    }


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("models"), "llama")


@pytest.fixture
def visit(llama, tmp_path):
    return visit_of(llama, tmp_path / "work", layer=1)


def compress(visit, plan, statistics=None, **options):
    compressor = MatrixCompressor(MatrixOptions(**{"measure": True, **options}))
    tensors, rows = compressor(visit, statistics or statistics_of(visit), plan)
    return tensors, {row["module"]: row for row in rows}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_pruned_and_quantised(tmp_path, name):
    visit = visit_of(saved_model(tmp_path, name), tmp_path / "work", layer=2)
    before, inputs = weights(visit), inputs_of(visit)
    others = {n: p.clone() for n, p in visit.block.named_parameters()}
    plan = plan_of(visit, keep=0.5, bits=4, group_size=8)
    tensors, rows = compress(visit, plan, method="sparsegpt", quantiser="gptq")
    assert set(rows) == set(before)
    assert {n for n in tensors if not n.startswith("codes:")} == set(others)
    for matrix, made in weights(visit).items():
        row = rows[matrix]
        assert row["kept"] == row["total"] // 2
        assert int((made != 0).sum()) <= row["kept"]
        assert (row["bits"], row["group_size"]) == (4, 8)
        codes = tensors[f"codes:{matrix}.codes"]
        assert codes.dtype == torch.int8 and codes.shape == made.shape
        assert int(codes.min()) >= -8 and int(codes.max()) <= 7
        scale = tensors[f"codes:{matrix}.scale"].repeat_interleave(8, 1)
        assert torch.equal(codes.float() * scale, made)
        outputs = inputs[matrix] @ before[matrix].double().T
        error = (inputs[matrix] @ made.double().T - outputs).norm() / outputs.norm()
        assert row["error"] == pytest.approx(float(error), rel=1e-3)
        assert row["error"] < 0.7
        stored = made.T if visit.layout.transposed else made
        assert torch.equal(tensors[f"{matrix}.weight"], stored)
        others.pop(f"{matrix}.weight")
    for other, tensor in others.items():
        assert torch.equal(tensors[other], tensor), "only matrices change"
    full = [{"id": 0, "layer": 2, **row} for row in rows.values()]
    pa.Table.from_pylist(full, COMPRESSED).validate(full=True)


def expected_score(method, weight, x, statistics, matrix):
    """Of every weight, by the definition, float64."""
    w = weight.double().abs()
    if method == "magnitude":
        return w
    norm = x.square().sum(0).sqrt()
    if method == "wanda":
        return w * norm
    g = statistics[matrix, "gradient_square"].double().sqrt()
    return w * (norm / math.sqrt(4)) + 100 * w * g


@pytest.mark.parametrize("method", ["magnitude", "wanda", "gblm"])
def test_masks_are_those_of_the_definition(visit, method):
    before, inputs, statistics = weights(visit), inputs_of(visit), statistics_of(visit)
    _, rows = compress(visit, plan_of(visit, keep=0.6), statistics, method=method)
    for matrix, made in weights(visit).items():
        score = expected_score(method, before[matrix], inputs[matrix], statistics, matrix)
        mask = made != 0
        assert torch.equal(made[mask], before[matrix][mask])
        count = rows[matrix]["kept"]
        assert int(mask.sum()) == count == round(made.numel() * 0.6)
        if method == "magnitude":
            assert score[mask].min() >= score[~mask].max()
            continue
        each, more = divmod(count, len(mask))
        assert mask.sum(1).tolist() == [each + 1] * more + [each] * (len(mask) - more)
        for row in range(len(mask)):
            kept, gone = score[row][mask[row]], score[row][~mask[row]]
            assert kept.min() >= gone.max() * (1 - 1e-6)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "gblm"])
def test_the_catalogue_decides_the_same(visit, method):
    """The pruner over signals of single weights gives the mask that was applied."""
    before, statistics = weights(visit), statistics_of(visit)
    compress(visit, plan_of(visit, keep=0.5), statistics, method=method)
    made = weights(visit)["mlp.up_proj"]
    out, size = made.shape
    norm = statistics["mlp.gate_proj", "sum_squares"]
    norm = (norm / (4 if method == "gblm" else 1)).sqrt().float()
    signals = Signals(
        {
            "id": np.arange(out * size),
            "output": np.repeat(np.arange(out), size),
            "weight": before["mlp.up_proj"].reshape(-1).numpy(),
            "input_norm": norm.repeat(out).numpy(),
            "weight_gradient": statistics["mlp.up_proj", "gradient_square"].sqrt().reshape(-1),
        }
    )
    selection = METHODS[method](keep=0.5)(signals, seed=0)
    assert np.array_equal(selection.keep.reshape(out, size), (made != 0).numpy())


@pytest.mark.parametrize("method", PRUNERS)
@pytest.mark.parametrize("pattern", [(2, 4), (4, 8)])
def test_patterns(visit, method, pattern):
    _, rows = compress(visit, plan_of(visit, pattern=pattern), method=method)
    for matrix, made in weights(visit).items():
        kept = (made != 0).view(len(made), -1, pattern[1]).sum(2)
        assert (kept == pattern[0]).all()
        assert rows[matrix]["kept"] == made.numel() // 2


@pytest.mark.parametrize("method", PRUNERS)
@pytest.mark.parametrize("keep", [0.0, 0.333, 1.0])
def test_any_count_is_met_exactly(visit, method, keep):
    before = weights(visit)
    _, rows = compress(visit, plan_of(visit, keep=keep), method=method)
    for matrix, made in weights(visit).items():
        assert int((made != 0).sum()) == rows[matrix]["kept"] == round(made.numel() * keep)
        if keep == 1.0:
            assert torch.equal(made, before[matrix]) and rows[matrix]["error"] == 0.0


def test_errors_are_in_the_expected_order(llama, tmp_path):
    mean = {}
    for number, options in enumerate(
        [
            {"method": "random_weights"},
            {"method": "magnitude"},
            {"method": "wanda"},
            {"method": "wanda", "update": True},
        ]
    ):
        visit = visit_of(llama, tmp_path / str(number), rows=40, length=32)
        _, rows = compress(visit, plan_of(visit), **options)
        mean[number] = np.mean([row["error"] for row in rows.values()])
    assert all(a > b for a, b in itertools.pairwise(mean.values())), mean


def test_bits_and_quantisers(llama, tmp_path):
    errors = {}
    for number, (quantiser, bits) in enumerate(itertools.product(("rtn", "gptq"), (2, 3, 4, 8))):
        visit = visit_of(llama, tmp_path / str(number), rows=40, length=32)
        plan = plan_of(visit, keep=1.0, bits=bits, group_size=16)
        tensors, rows = compress(visit, plan, quantiser=quantiser, clip=True, symmetric=False)
        errors[quantiser, bits] = np.mean([row["error"] for row in rows.values()])
        assert tensors["codes:mlp.up_proj.zero"].dtype == torch.int8
        assert int(tensors["codes:mlp.up_proj.codes"].max()) < 2 ** (bits - 1)
    for quantiser in ("rtn", "gptq"):
        series = [errors[quantiser, bits] for bits in (2, 3, 4, 8)]
        assert all(a > 1.5 * b for a, b in itertools.pairwise(series))
    assert all(errors["gptq", bits] < errors["rtn", bits] for bits in (2, 3, 4, 8))


def test_rsq_weighs_tokens(llama, tmp_path):
    """What it makes is nearer on the loud tokens than GPTQ's, and further on all."""
    made = {}
    for quantiser in ("gptq", "rsq"):
        visit = visit_of(llama, tmp_path / quantiser, rows=30)
        statistics = statistics_of(visit)
        x = inputs_of(visit)["mlp.down_proj"]
        r = (torch.arange(len(x)) % 10 == 0).double()[:, None] * 10
        weighted = (x.T @ (x * r)).float()
        statistics["mlp.down_proj", "weighted_gram"] = weighted
        before = weights(visit)["mlp.down_proj"].double()
        plan = plan_of(visit, keep=1.0, bits=3, group_size=16)
        assert quantiser != "rsq" or "weighted_gram" in _wanted(quantiser=quantiser)
        compress(visit, plan, statistics, quantiser=quantiser)
        moved = weights(visit)["mlp.down_proj"].double() - before
        made[quantiser] = float((x @ moved.T * r).norm()), float((x @ moved.T).norm())
    assert made["rsq"][0] < made["gptq"][0]
    assert made["rsq"][1] > made["gptq"][1]


def test_an_error_over_weighted_tokens_alone_says_so(visit):
    statistics = {k: v for k, v in statistics_of(visit).items() if k[1] != "gram"}
    plan = plan_of(visit, keep=1.0, bits=4, group_size=16)
    _, rows = compress(visit, plan, statistics, quantiser="rsq")
    assert rows["mlp.up_proj"]["note"] == "error over weighted tokens"


def _wanted(**options):
    return MatrixCompressor(MatrixOptions(**options)).wanted


def test_no_more_statistics_are_wanted_than_needed():
    assert _wanted(method="magnitude") == _wanted(method="random_weights") == frozenset()
    assert _wanted(quantiser="rtn") == frozenset()
    assert _wanted(method="wanda", quantiser="rtn") == {"count", "sum_squares"}
    assert _wanted(method="magnitude", measure=True) == {"count", "gram"}
    assert _wanted(method="magnitude", update=True) == {"count", "gram"}
    assert _wanted(method="sparsegpt") == _wanted(quantiser="gptq") == {"count", "gram"}
    assert _wanted(method="sparsegpt", quantiser="rsq") == {"count", "weighted_gram"}
    gradients = {"count", "sum_squares", "gradient_rows"}
    assert _wanted(method="gblm") == gradients | {"gradient_square"}
    l1 = _wanted(method="gblm", method_options={"norm": "l1"})
    assert l1 == gradients | {"gradient_abs"}


@pytest.mark.parametrize("quantiser", ["none", "rtn", "gptq", "rsq"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "gblm"])
def test_an_expert_without_tokens_goes_by_magnitude(tmp_path, method, quantiser):
    visit = visit_of(saved_model(tmp_path, "mixtral"), tmp_path / "work")
    statistics = statistics_of(visit)
    lost = "mlp.experts.1"
    for key in list(statistics):
        if key[0].startswith(lost) and not key[1].startswith("gradient"):
            statistics[key] = torch.zeros_like(statistics[key])
    before = weights(visit)
    bits = {} if quantiser == "none" else {"bits": 4, "group_size": 8}
    plan = plan_of(visit, keep=0.5, **bits)
    _, rows = compress(visit, plan, statistics, method=method, quantiser=quantiser)
    made = weights(visit)
    for matrix, row in rows.items():
        unseen = matrix.startswith(lost)
        assert ("no token reached it" in row["note"]) == unseen
        assert row["kept"] == row["total"] // 2
        assert (row["error"] is None) == unseen
        if unseen and quantiser == "none":
            w, mask = before[matrix].abs(), made[matrix] != 0
            assert w[mask].min() >= w[~mask].max()


def test_errors_are_measured_on_request(visit):
    statistics, before = statistics_of(visit), weights(visit)
    _, rows = compress(visit, plan_of(visit), statistics, method="sparsegpt", measure=False)
    assert all(row["error"] is None for row in rows.values())
    plain = weights(visit)
    visit.block.load_state_dict({f"{name}.weight": w for name, w in before.items()}, strict=False)
    compress(visit, plan_of(visit), statistics, method="sparsegpt")
    assert all(torch.equal(plain[name], made) for name, made in weights(visit).items())


def test_how_many_inputs_are_fixed_at_a_time_is_an_option(llama, tmp_path):
    errors = []
    for number, together in enumerate((None, 128)):
        visit = visit_of(llama, tmp_path / str(number), rows=40, length=32)
        _, rows = compress(visit, plan_of(visit), method="sparsegpt", together=together)
        errors.append(np.mean([row["error"] for row in rows.values()]))
    assert errors[0] < errors[1]


def test_a_raised_damping_is_told(llama, tmp_path):
    visit = visit_of(llama, tmp_path / "work", rows=1, length=4)
    plan = plan_of(visit)
    _, rows = compress(visit, plan, method="sparsegpt", damping=1e-13)
    assert "damping raised to" in rows["mlp.down_proj"]["note"]


def test_random_weights_follow_the_seed_and_the_matrix(llama, tmp_path):
    masks = []
    for number, seed in enumerate((0, 0, 1)):
        visit = visit_of(llama, tmp_path / str(number))
        compress(visit, plan_of(visit), method="random_weights", seed=seed)
        masks.append({name: w != 0 for name, w in weights(visit).items()})
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    assert not torch.equal(masks[0]["mlp.up_proj"], masks[2]["mlp.up_proj"])
    assert not torch.equal(masks[0]["mlp.up_proj"], masks[0]["mlp.gate_proj"])


@pytest.mark.parametrize("method", PRUNERS)
def test_same_inputs_same_bytes(llama, tmp_path, method):
    made = []
    for number in range(2):
        visit = visit_of(llama, tmp_path / str(number))
        plan = plan_of(visit, keep=0.5, bits=4, group_size=16)
        tensors, _ = compress(visit, plan, method=method, quantiser="gptq", act_order=True)
        made.append(tensors)
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_the_dtype_is_kept(llama, tmp_path):
    visit = visit_of(llama, tmp_path / "work", dtype="bfloat16")
    plan = plan_of(visit, keep=0.5, bits=4, group_size=16)
    tensors, rows = compress(visit, plan, method="sparsegpt", quantiser="gptq")
    assert tensors["mlp.up_proj.weight"].dtype == torch.bfloat16
    assert tensors["codes:mlp.up_proj.codes"].dtype == torch.int8
    exact = tensors["codes:mlp.up_proj.scale"].repeat_interleave(16, 1)
    exact = tensors["codes:mlp.up_proj.codes"] * exact
    assert torch.equal(tensors["mlp.up_proj.weight"], exact.bfloat16())
    assert int((tensors["mlp.up_proj.weight"] != 0).sum()) <= rows["mlp.up_proj"]["kept"]


def test_matrices_out_of_the_plan_stay(visit):
    before = weights(visit)
    plan = [row for row in plan_of(visit) if row["module"] == "mlp.up_proj"]
    tensors, rows = compress(visit, plan, method="wanda")
    assert list(rows) == ["mlp.up_proj"]
    for name, made in weights(visit).items():
        assert torch.equal(made, before[name]) == (name != "mlp.up_proj")
    assert "self_attn.q_proj.weight" in tensors


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"method": "sparsegpt"}, "gram"),
        ({"method": "wanda"}, "sum_squares"),
        ({"method": "gblm"}, "gradient_square"),
    ],
)
def test_statistics_that_are_no_numbers_are_refused_by_name(visit, options, name, poison):
    statistics, before = statistics_of(visit), weights(visit)
    statistics["mlp.down_proj", name].flatten()[-1] = poison
    plan = [row for row in plan_of(visit) if row["module"] == "mlp.down_proj"]
    with pytest.raises(InputError, match=rf"layer 1, mlp\.down_proj: .*'{name}'.*finite"):
        compress(visit, plan, statistics, **options)
    assert torch.equal(weights(visit)["mlp.down_proj"], before["mlp.down_proj"])


def test_missing_or_foreign_statistics_are_refused_by_name(visit):
    statistics = statistics_of(visit)
    del statistics["self_attn.q_proj", "gram"]
    with pytest.raises(InputError, match=r"layer 1, self_attn\.q_proj: .*'gram'.*missing.*count"):
        compress(visit, plan_of(visit), statistics, method="sparsegpt")
    statistics["self_attn.q_proj", "gram"] = torch.zeros(5, 5)
    with pytest.raises(InputError, match=r"layer 1, self_attn\.q_proj: .*\(32, 32\).*\(5, 5\)"):
        compress(visit, plan_of(visit), statistics, method="sparsegpt")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"module": "mlp.other"}, {}, "mlp.other: expected a plan row.*mlp.up_proj"),
        ({"unit": "neuron"}, {}, "unit 'neuron'"),
        ({"total": 7}, {}, r"plan for the matrix's 1024 weights; found 512 of 7"),
        ({"keep": 2000}, {}, "found 2000 of 1024"),
        ({"n": 2, "m": 5}, {}, r"self_attn\.q_proj: .*2:5.*32 inputs"),
        ({"n": 2, "m": 5}, {"method": "sparsegpt"}, r"self_attn\.q_proj: .*2:5.*32 inputs"),
        ({}, {"method": "none"}, "names no method"),
        ({"bits": 4, "group_size": 8}, {}, "names no quantiser"),
        ({"bits": 4, "group_size": 5}, {"quantiser": "rtn"}, "q_proj: .*5 must divide.*32"),
        ({"bits": 4, "group_size": 5}, {"quantiser": "gptq"}, "q_proj: .*5 must divide.*32"),
        ({"bits": 5, "group_size": 8}, {"quantiser": "rtn"}, "bits"),
    ],
)
def test_plans_that_cannot_be_carried_out(visit, change, options, message):
    row = {**plan_of(visit)[0], **change}
    with pytest.raises(InputError, match=f"layer 1, .*{message}"):
        compress(visit, [row], **{"method": "wanda", **options})


@pytest.mark.parametrize(
    "options", [{"method": "flap"}, {"quantiser": "awq"}, {"damping": 0.0}, {"damping": math.inf}]
)
def test_bad_options(options):
    with pytest.raises(InputError, match=next(iter(options))):
        MatrixOptions(**options)
