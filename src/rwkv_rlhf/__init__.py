"""Fine-tuning and alignment of RWKV language models. The rooms and their order: docs/architecture.md."""

__version__ = "0.2.0"
