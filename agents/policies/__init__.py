"""Who decides which tokens stay."""
