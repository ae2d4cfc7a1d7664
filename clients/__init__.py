"""What runs beside private data: the Flower ClientApp, the trainer, the node and its policy."""
