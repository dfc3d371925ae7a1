"""The searches: one file each; `pipelines.prompts.search` names and runs them."""
