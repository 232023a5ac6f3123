"""What an encoder is judged on: labelled sets, and how they are divided."""
