"""Statistics of a whole model by plain hooks in float64: definitions, for the tests to hold to."""

import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

# Of each architecture: blocks, attention and the modules whose inputs are looked at.
LLAMA = (
    "model.layers",
    "self_attn",
    "self_attn.q_proj self_attn.o_proj mlp.gate_proj mlp.down_proj",
)
PLACES = dict.fromkeys(["llama", "llama_tied", "mistral", "qwen2", "qwen3"], LLAMA) | {
    "gpt2": ("transformer.h", "attn", "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"),
    "opt": ("model.decoder.layers", "self_attn", "self_attn.q_proj self_attn.out_proj fc1 fc2"),
    "bert": (
        "bert.encoder.layer",
        "attention.self",
        "attention.self.query attention.output.dense intermediate.dense output.dense",
    ),
}
MOE = ["mixtral", "qwen2_moe", "qwen3_moe"]
PLACES |= dict.fromkeys(MOE, ("model.layers", "self_attn", "self_attn.q_proj self_attn.o_proj"))


def whole(folder, name):
    auto = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
    more = {"experts_implementation": "eager"} if name in MOE else {}
    return auto.from_pretrained(folder, attn_implementation="eager", **more).eval().double()


def record(model, name, rows):
    """For each layer: rows of {place: value} as each row alone goes through the model."""
    blocks, attention, inside = PLACES[name]
    blocks = model.get_submodule(blocks)
    made = [[] for _ in blocks]
    hooks, now = [], [{} for _ in blocks]

    def see(layer, place, module, *, output=False):
        def before(_, args, kwargs):
            now[layer][place] = (args or tuple(kwargs.values()))[0].detach()

        def after(_, args, out):
            now[layer][place] = out

        if output:
            hooks.append(module.register_forward_hook(after))
        else:
            hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))

    for layer, block in enumerate(blocks):
        see(layer, "in", block)
        see(layer, "out", block, output=True)
        see(layer, "attention", block.get_submodule(attention), output=True)
        modules = dict(block.named_modules())
        for place in inside.split():
            see(layer, place, modules[place])
        if name in MOE:
            see(layer, "residual", modules["post_attention_layernorm"])
            if "mlp.experts" in modules:
                see(layer, "x", modules["mlp"])
                see(layer, "router", modules["mlp.gate"], output=True)
                see(layer, "routed", modules["mlp.experts"], output=True)
            for place in ("mlp.gate_proj", "mlp.down_proj", "mlp.shared_expert.down_proj"):
                if place in modules:
                    see(layer, place, modules[place])
    for row in rows:
        for found in now:
            found.clear()
        with torch.no_grad():
            model(input_ids=torch.as_tensor(row)[None].long())
        for layer, found in enumerate(now):
            made[layer].append(dict(found))
    for hook in hooks:
        hook.remove()
    return made


def inputs(found, place):
    """(T, in) of one row."""
    return found[place].reshape(-1, found[place].shape[-1])


def received(found):
    """(T,) attention that each token receives, over heads and queries."""
    return found["attention"][1][0].sum((0, 1))


def token_weights(found, r_min, power):
    """(T,) weights of RSQ."""
    a = received(found)
    if a.max() == a.min():
        return torch.ones_like(a)
    r = r_min + (1 - r_min) * (a - a.min()) / (a.max() - a.min())
    return (r / r.mean()) ** power


def gates(found, block, experts):
    """(T, E) router weights, 0 where not chosen, and (E, T, d) of every expert."""
    x = inputs(found, "x")
    _, weight, index = found["router"]
    dense = torch.zeros(len(x), experts, dtype=torch.float64).scatter(1, index, weight.double())
    stacked = block.get_submodule("mlp.experts")
    outs = []
    for expert in range(experts):
        gate, up = (stacked.gate_up_proj[expert] @ x.T).T.chunk(2, -1)
        outs.append((stacked.act_fn(gate) * up) @ stacked.down_proj[expert].T)
    return dense, torch.stack(outs)
