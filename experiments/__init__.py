"""The reproduction study: hybrid fine-tuning on small and large models; see README.md here."""
