"""The ``BatchedEnv`` protocol and its two kinds: the token game, copies of a PettingZoo game."""
