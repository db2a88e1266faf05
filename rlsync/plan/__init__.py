"""From placements to a plan: proof, planner, cut into buckets, their byte layout, link classes and cost. Pure; executes nothing."""
