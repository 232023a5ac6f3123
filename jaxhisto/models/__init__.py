"""The networks, with torchvision's attribute names."""
