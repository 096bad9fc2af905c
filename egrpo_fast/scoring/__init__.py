"""How a reward is called and checked, and what rewards that are networks share."""
