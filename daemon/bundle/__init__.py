"""The file format: a sealed tar in zstd frames, its sibling, its encryption. `docs/FORMAT.md` is the spec."""
