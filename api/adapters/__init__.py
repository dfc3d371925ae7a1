"""Prunery inside other frameworks: LangChain, LlamaIndex, Haystack (an extra of each name)."""
