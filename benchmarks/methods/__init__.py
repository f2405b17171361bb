"""The methods of ``benchmarks.compare``: ways to choose which tokens go."""
