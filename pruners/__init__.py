"""The methods: pure functions of arrays, by what they prune."""
