"""The order of things: serve, load, store; speed, answers, the search for the highest rate, the plan."""
