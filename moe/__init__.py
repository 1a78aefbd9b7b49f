"""alf-moe: pretraining of sparse mixture-of-experts language models with auxiliary-loss-free load balancing."""

__version__ = "0.1.0"
