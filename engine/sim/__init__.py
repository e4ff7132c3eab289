"""A simulated engine: pure deciders that can be driven in real or in virtual time."""
