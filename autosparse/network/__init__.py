"""What can be seen on a network without training it: its graph, its signals, which weights are reachable."""
