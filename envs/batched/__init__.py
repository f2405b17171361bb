"""Environments as batches of tensors: the token game, and copies of PettingZoo environments."""
