"""How good the model is: metrics, predictions, the best epoch."""
