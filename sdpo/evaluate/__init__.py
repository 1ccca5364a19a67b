"""Published benchmarks of answers: their files checked, their verdicts replayed, and the style of
what won or lost beside every win rate."""
