"""Prompt search: the task, its vocabulary, what each word is worth, the search, the verdict."""
