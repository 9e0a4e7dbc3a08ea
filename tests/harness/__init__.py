"""Real things for tests, the demo and the benchmarks to work with: servers, agents, processes."""
