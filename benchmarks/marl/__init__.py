"""Our trainer compared with other MARL libraries on standard games."""
