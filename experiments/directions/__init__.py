"""What directions and rules are worth: the grid of runs, its times, tables and plots."""
