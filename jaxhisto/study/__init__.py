"""Encoders x tasks x shares of the labels, from one file."""
