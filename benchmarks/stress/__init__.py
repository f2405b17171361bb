"""Long runs that look for leaks, and for what a kill breaks."""
