"""Arithmetic: reference, torch and Triton implementations behind one name each.

Importing this package loads neither torch nor Triton: an implementation is loaded by its first
call. (The functions are imported here at once, because a module of the same name would
otherwise take the name's place the moment it is loaded.)
"""

from .attention_mass import AttentionMass, attention_mass
from .token_stats import TokenStats, token_stats

__all__ = ["AttentionMass", "TokenStats", "attention_mass", "token_stats"]
