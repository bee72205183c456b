"""Formats of servers and of runtimes that read ONNX: a file each. Importing this imports no torch."""
