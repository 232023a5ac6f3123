"""SimCLR pretraining: loss, step, loop."""
