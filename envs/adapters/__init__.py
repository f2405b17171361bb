"""The game for other RL libraries, one module for each."""
