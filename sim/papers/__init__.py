"""Published experiments, run again: the same arms, and the paper's numbers beside ours."""
