"""The Open Inference Protocol v2, over REST and over gRPC: the same tensors on two wires."""
