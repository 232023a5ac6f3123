"""What an encoder is worth: features, probes, fine-tuning, segmentation, clusters."""
