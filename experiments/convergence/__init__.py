"""The convergence theorem against runs: its step sizes, its failures, its lemma on estimates."""
