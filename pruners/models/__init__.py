"""Networks of our own and how their weights are loaded: the only I/O under pruners/.

- `provence`: the network, `load_provence`, `save_provence`;
- `encoders`: where an encoder's files are, digests checked;
- `layouts`: published checkpoints of other projects;
- `default/`: the weights that are shipped, and their model card.
"""
