"""Pictures by the million as tokens: bulk tokenising, token datasets, an index over them, search."""
