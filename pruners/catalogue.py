"""Every method by name. A new one is one file, one line here and one golden case."""

from __future__ import annotations

from typing import Any

from .context.cosine import Cosine
from .context.dslr import Dslr
from .context.first_k import FirstK
from .context.lexrank import LexRank
from .context.provence import Provence
from .context.random_sentences import RandomSentences
from .contract import Pruner
from .prompt.claps import Claps
from .prompt.random_prompts import RandomPrompts
from .sample.aum import Aum
from .sample.ccs import Ccs
from .sample.d2 import D2
from .sample.deita import Deita
from .sample.dual import Dual
from .sample.dyn_unc import DynUnc
from .sample.el2n import El2n
from .sample.forgetting import Forgetting
from .sample.grand import Grand
from .sample.herding import Herding
from .sample.ifd import Ifd
from .sample.influence import Influence
from .sample.infobatch import InfoBatch
from .sample.k_center import KCenter
from .sample.knn_shapley import KnnShapley
from .sample.longest import Longest
from .sample.memorisation import Memorisation
from .sample.moderate import Moderate
from .sample.near_duplicate import NearDuplicate
from .sample.perplexity_window import PerplexityWindow
from .sample.prototypes import Prototypes
from .sample.qurating import QuRating
from .sample.random import Random
from .sample.s2l import S2L
from .sample.semdedup import SemDeDup
from .sample.stratified_random import StratifiedRandom
from .sample.superfiltering import Superfiltering
from .sample.tdds import Tdds
from .token.excess_loss import ExcessLoss
from .token.perplexity_tokens import PerplexityTokens
from .token.qtuning import QTuning
from .token.random_tokens import RandomTokens
from .token.sstoken import SsToken
from .token.token_cleaning import TokenCleaning
from .weight.block_influence import BlockInfluence
from .weight.cfsp import Cfsp
from .weight.easy_ep import EasyEp
from .weight.expert_frequency import ExpertFrequency
from .weight.flap import Flap
from .weight.gaprune import GaPrune
from .weight.gblm import Gblm
from .weight.llm_pruner import LlmPruner
from .weight.magnitude import Magnitude
from .weight.magnitude_groups import MagnitudeGroups
from .weight.random_groups import RandomExperts, RandomGroups, RandomLayers
from .weight.random_weights import RandomWeights
from .weight.reap import Reap
from .weight.sparsegpt import SparseGpt
from .weight.wanda import Wanda
from .weight.wanda_sp import WandaSp

METHODS: dict[str, type[Pruner]] = {
    # context
    "provence": Provence,
    "cosine": Cosine,
    "dslr": Dslr,
    "lexrank": LexRank,
    "first_k": FirstK,
    "random_sentences": RandomSentences,
    # sample
    "random": Random,
    "near_duplicate": NearDuplicate,
    "ifd": Ifd,
    "superfiltering": Superfiltering,
    "s2l": S2L,
    "infobatch": InfoBatch,
    "deita": Deita,
    "longest": Longest,
    "perplexity_window": PerplexityWindow,
    "qurating": QuRating,
    "k_center": KCenter,
    "stratified_random": StratifiedRandom,
    "el2n": El2n,
    "grand": Grand,
    "forgetting": Forgetting,
    "aum": Aum,
    "memorisation": Memorisation,
    "influence": Influence,
    "dyn_unc": DynUnc,
    "tdds": Tdds,
    "dual": Dual,
    "ccs": Ccs,
    "d2": D2,
    "knn_shapley": KnnShapley,
    "herding": Herding,
    "moderate": Moderate,
    "prototypes": Prototypes,
    "semdedup": SemDeDup,
    # token
    "qtuning": QTuning,
    "sstoken": SsToken,
    "excess_loss": ExcessLoss,
    "token_cleaning": TokenCleaning,
    "perplexity_tokens": PerplexityTokens,
    "random_tokens": RandomTokens,
    # prompt
    "claps": Claps,
    "random_prompts": RandomPrompts,
    # weight
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGpt,
    "gblm": Gblm,
    "random_weights": RandomWeights,
    # weight
    "gaprune": GaPrune,
    # groups of weights: heads and neurons, experts, layers
    "flap": Flap,
    "cfsp": Cfsp,
    "llm_pruner": LlmPruner,
    "wanda_sp": WandaSp,
    "magnitude_groups": MagnitudeGroups,
    "random_groups": RandomGroups,
    "reap": Reap,
    "easy_ep": EasyEp,
    "expert_frequency": ExpertFrequency,
    "random_experts": RandomExperts,
    "block_influence": BlockInfluence,
    "random_layers": RandomLayers,
}


def describe(name: str) -> dict[str, Any]:
    """A method in words, from its declaration: what `prunery methods` and the README print."""
    method = METHODS[name]
    return {
        "name": name,
        "unit": method.unit,
        "budget": method.budget.field,
        "default": getattr(method(), method.budget.field),
        "kind": method.budget.kind,
        "scope": method.scope,
        "needs": sorted(method.needs - {"id"}),
        "optional": sorted(method.optional),
        "about": " ".join((method.__doc__ or "").strip().partition("\n\n")[0].split()),
    }


def markdown_table() -> str:
    """The README's table of methods; `prunery methods --markdown` prints it."""
    lines = ["| method | prunes | budget | signals | what it does |", "|---|---|---|---|---|"]
    for name in METHODS:
        row = describe(name)
        signals = ", ".join(f"`{need}`" for need in row["needs"]) or "none"
        budget = f"`{row['budget']}` ({row['kind'].replace('_', ' ')}), {row['default']}"
        lines.append(f"| `{name}` | {row['unit']} | {budget} | {signals} | {row['about']} |")
    return "\n".join(lines)
