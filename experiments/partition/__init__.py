"""Where hybrid first- and zeroth-order training pays: runs, memory and time, tables and plots."""
