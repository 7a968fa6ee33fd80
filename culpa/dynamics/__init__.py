"""One update as mathematics: pure, differentiable maps anchored at every recorded state."""
